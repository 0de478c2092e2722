"""Counts of conversation scores per role, and the threshold that keeps an asked rate.

Scores are integers in steps. They are counted in bins of 8 steps (0.0002 in cosine), and only
bins in use are kept, so nothing is clamped. Adding and merging are exact and free of order. A
threshold is the upper end of its bin: at most 7 steps too high, never too low.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Int32s, Role

BIN_WIDTH: Final = 8

Int64s = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tally:
    """Counted scores of one role.

    Attributes:
      bins: score // BIN_WIDTH, int32 [k], ascending, each once.
      counts: how many scores fell into each, int64 [k].
    """

    bins: Int32s
    counts: Int64s

    @staticmethod
    def of(bins: Int32s, counts: Int64s) -> "Tally":
        """From bins in any order, each any number of times."""
        distinct, place = np.unique(bins, return_inverse=True)
        total = np.zeros(len(distinct), np.int64)
        np.add.at(total, place, counts)
        return Tally(distinct.astype(np.int32), total)

    @property
    def n(self) -> int:
        """How many scores were counted."""
        return int(self.counts.sum())

    def plus(self, scores: Int32s) -> "Tally":
        """With scores [n] added; ABSENT ones are passed over."""
        bins = scores[scores != ABSENT] // BIN_WIDTH
        return self.merged(Tally.of(bins.astype(np.int32), np.ones(len(bins), np.int64)))

    def merged(self, other: "Tally") -> "Tally":
        """The scores of both."""
        return Tally.of(
            np.concatenate([self.bins, other.bins]), np.concatenate([self.counts, other.counts])
        )

    def upper_end(self, k: int) -> int:
        """The largest score that shares a bin with the k-th smallest one, 1 <= k <= n."""
        place = np.searchsorted(np.cumsum(self.counts), k)
        return (int(self.bins[place]) + 1) * BIN_WIDTH - 1


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """Counted scores, one `Tally` per role. Immutable.

    Attributes:
      roles: the scores of each role.
      absent: how many conversations could have been scored for a role but had no tokens of it,
        int64 [2].
    """

    roles: tuple[Tally, ...]
    absent: Int64s

    @staticmethod
    def empty() -> "ScoreCounts":
        """Counts of nothing: merging them in changes nothing."""
        nothing = Tally.of(np.empty(0, np.int32), np.empty(0, np.int64))
        return ScoreCounts((nothing,) * len(Role), np.zeros(len(Role), np.int64))

    @property
    def n(self) -> tuple[int, ...]:
        """How many scores each role has."""
        return tuple(tally.n for tally in self.roles)

    def plus(self, scores: Int32s, absent: NDArray[np.bool_]) -> "ScoreCounts":
        """With conversations added.

        Args:
          scores: in steps, [n, 2]; ABSENT: that role was not scored, for whatever reason.
          absent: whether that was for want of tokens only, [n, 2].
        """
        return ScoreCounts(
            tuple(tally.plus(scores[:, role]) for role, tally in enumerate(self.roles)),
            self.absent + absent.sum(axis=0, dtype=np.int64),
        )

    def merged(self, other: "ScoreCounts") -> "ScoreCounts":
        """The conversations of both."""
        pairs = zip(self.roles, other.roles, strict=True)
        roles = tuple(mine.merged(theirs) for mine, theirs in pairs)
        return ScoreCounts(roles, self.absent + other.absent)

    def conformal_threshold(self, role: Role, rate: Fraction, own_rate: Fraction) -> int | None:
        """The score that further, exchangeable conversations exceed no more often than asked.

        Split conformal prediction (Vovk, Gammerman & Shafer 2005, "Algorithmic Learning in a
        Random World"): the k-th smallest of n scores, k = ceil((n + 1)(1 - rate)), is exceeded
        with chance `rate` at most. Conversations without tokens of the role stand below all
        scores, as they can exceed nothing.

        Args:
          role: whose scores.
          rate: among all conversations. A fraction, because as a float (199 + 1) * 0.995 could
            come out above 199 and ask for one score too many.
          own_rate: among those with tokens of the role. Without it, a role rarer than `rate`
            would be flagged whenever it appears.

        Returns:
          Steps, or None while there are too few conversations for the rates (k > n).
        """
        tally = self.roles[role]
        absent = int(self.absent[role])
        among_all = ceil((tally.n + absent + 1) * (1 - rate)) - absent
        k = max(among_all, ceil((tally.n + 1) * (1 - own_rate)))
        return tally.upper_end(k) if k <= tally.n else None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Per role `ROLE_score_bins` int32 [k] and `ROLE_score_counts` int64 [k]; `absent`."""
        arrays: dict[str, NDArray[Any]] = {"absent": self.absent}
        for role in Role:
            bins_name, counts_name = _array_names(role)
            arrays[bins_name] = self.roles[role].bins
            arrays[counts_name] = self.roles[role].counts
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> "ScoreCounts":
        """Read back what `to_arrays` gave. Raises KeyError when an array is missing."""
        tallies = (Tally(*(arrays[name] for name in _array_names(role))) for role in Role)
        return ScoreCounts(tuple(tallies), arrays["absent"])


def _array_names(role: Role) -> tuple[str, str]:
    return f"{role.name.lower()}_score_bins", f"{role.name.lower()}_score_counts"
