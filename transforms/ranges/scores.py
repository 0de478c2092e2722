"""Counts of conversations' scores per role and length, and the threshold that keeps an asked rate.

A role's score is that of its highest stretch, so it grows with how many stretches there are: its
*length*, counted in powers of two. Scores are integers in steps. They are counted in bins of 8
steps (0.0002 in cosine), and only bins in use are kept, so nothing is clamped. Adding and merging
are exact and free of order. A threshold is the upper end of its bin: at most 7 steps too high,
never too low.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Int32s, Role

BIN_WIDTH: Final = 8
LENGTHS: Final = 12
"""Length l has 2^l to 2^(l + 1) - 1 stretches; the last has no end."""

WAITING: Final = 256
"""Calls of `plus` whose scores wait for being tallied together."""

Int64s = NDArray[np.int64]


def length_of(stretches: NDArray[np.integer[Any]]) -> Int64s:
    """Length, 0 to LENGTHS - 1, of a number of stretches; of none that of one."""
    exponents = np.frexp(np.maximum(stretches, 1))[1] - 1
    return np.minimum(exponents, LENGTHS - 1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Tally:
    """Counted scores of one role; every pair of length and bin stands once, in ascending order.

    Attributes:
      lengths: int32 [k].
      bins: score // BIN_WIDTH, int32 [k].
      counts: how many scores were of the length and fell into the bin, int64 [k].
    """

    lengths: Int32s
    bins: Int32s
    counts: Int64s

    @staticmethod
    def of(lengths: NDArray[Any], bins: NDArray[Any], counts: NDArray[Any]) -> "Tally":
        """From pairs in any order, each any number of times."""
        order = np.lexsort((bins, lengths))
        lengths, bins = (pairs[order].astype(np.int32) for pairs in (lengths, bins))
        is_new = np.ones(len(order), np.bool_)
        is_new[1:] = (lengths[1:] != lengths[:-1]) | (bins[1:] != bins[:-1])
        firsts = np.flatnonzero(is_new)
        total = np.add.reduceat(counts[order].astype(np.int64), firsts)
        return Tally(lengths[firsts], bins[firsts], total)

    @property
    def n(self) -> int:
        """How many scores were counted."""
        return int(self.counts.sum())

    def plus(self, scores: Int32s, lengths: Int64s) -> "Tally":
        """With scores [n] of some lengths [n] added; ABSENT ones are passed over."""
        scored = scores != ABSENT
        bins = scores[scored] // BIN_WIDTH
        return self.merged(Tally.of(lengths[scored], bins, np.ones(len(bins), np.int64)))

    def merged(self, other: "Tally") -> "Tally":
        """The scores of both."""
        pairs = ((self.lengths, other.lengths), (self.bins, other.bins))
        lengths, bins = (np.concatenate(pair) for pair in pairs)
        return Tally.of(lengths, bins, np.concatenate([self.counts, other.counts]))

    def of_length(self, length: int) -> "Tally":
        """The scores of a length."""
        mine = self.lengths == length
        return Tally(self.lengths[mine], self.bins[mine], self.counts[mine])

    def lowered(self, handicap: int) -> "Tally":
        """With so many bins taken off all scores, times their length."""
        return Tally.of(np.zeros_like(self.bins), self.bins - handicap * self.lengths, self.counts)

    def upper_end(self, k: int) -> int:
        """The largest score in a bin with the k-th smallest one, 1 <= k <= n; of one length."""
        place = np.searchsorted(np.cumsum(self.counts), k)
        return (int(self.bins[place]) + 1) * BIN_WIDTH - 1


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """Counted scores, one `Tally` per role for either kind. Immutable.

    Attributes:
      absent: how many conversations could have been scored for a role but had no tokens of it,
        int64 [2].
    """

    absent: Int64s
    _kept: tuple[Tally, ...]
    _held: tuple[Tally, ...]
    _waiting: tuple[Int64s, ...] = ()  # see `_columns`

    @staticmethod
    def empty() -> "ScoreCounts":
        """Counts of nothing: merging them in changes nothing."""
        nothing = (Tally.of(*(np.empty(0, np.int64) for _ in range(3))),) * len(Role)
        return ScoreCounts(np.zeros(len(Role), np.int64), nothing, nothing)

    @cached_property
    def kept(self) -> tuple[Tally, ...]:
        """Scores that count as they are."""
        scores, held, lengths = self._columns()
        return _added(self._kept, np.where(held == ABSENT, scores, ABSENT), lengths)

    @cached_property
    def held(self) -> tuple[Tally, ...]:
        """Scores that were held down to the threshold they were above."""
        _, held, lengths = self._columns()
        return _added(self._held, held, lengths)

    @property
    def n(self) -> tuple[int, ...]:
        """How many scores each role has."""
        return tuple(self.of_role(role).n for role in Role)

    def of_role(self, role: Role) -> Tally:
        """All scores of a role."""
        return self.kept[role].merged(self.held[role])

    def plus(
        self,
        scores: Int32s,
        lengths: Int64s,
        absent: NDArray[np.bool_],
        held: Int32s | None = None,
    ) -> "ScoreCounts":
        """With conversations added.

        Args:
          scores: in steps, [n, 2]; ABSENT: that role was not scored, for whatever reason.
          lengths: of the role's part in the conversation, [n, 2].
          absent: whether a role was not scored for want of tokens only, [n, 2].
          held: what a score is held down to, [n, 2]; ABSENT where it counts as it is. None: all do.
        """
        held = np.full_like(scores, ABSENT) if held is None else held
        counts = ScoreCounts(
            self.absent + absent.sum(axis=0, dtype=np.int64),
            self._kept,
            self._held,
            (*self._waiting, np.stack([scores, held, lengths])),
        )
        if len(counts._waiting) < WAITING:
            return counts
        return ScoreCounts(counts.absent, counts.kept, counts.held)

    def merged(self, other: "ScoreCounts") -> "ScoreCounts":
        """The conversations of both."""
        kept, held = (
            tuple(mine.merged(theirs) for mine, theirs in zip(ours, of_other, strict=True))
            for ours, of_other in ((self.kept, other.kept), (self.held, other.held))
        )
        return ScoreCounts(self.absent + other.absent, kept, held)

    def conformal_threshold(
        self, role: Role, rate: Fraction, own_rate: Fraction, handicap: int = 0
    ) -> int | None:
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
          handicap: bins to be taken off all scores, times their length.

        Returns:
          Steps, or None while there are too few conversations for the rates (k > n).
        """
        tally = self.of_role(role).lowered(handicap)
        absent = int(self.absent[role])
        among_all = ceil((tally.n + absent + 1) * (1 - rate)) - absent
        k = max(among_all, ceil((tally.n + 1) * (1 - own_rate)))
        return tally.upper_end(k) if k <= tally.n else None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """`absent`, and per role and kind `ROLE_KIND_lengths`, `..._bins`, `..._counts`."""
        arrays: dict[str, NDArray[Any]] = {"absent": self.absent}
        for kind, tallies in (("kept", self.kept), ("held", self.held)):
            for role, tally in zip(Role, tallies, strict=True):
                columns = (tally.lengths, tally.bins, tally.counts)
                arrays |= dict(zip(_array_names(role, kind), columns, strict=True))
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> "ScoreCounts":
        """Read back what `to_arrays` gave. Raises KeyError when an array is missing."""
        kept, held = (
            tuple(Tally(*(arrays[name] for name in _array_names(role, kind))) for role in Role)
            for kind in ("kept", "held")
        )
        return ScoreCounts(arrays["absent"], kept, held)

    def _columns(self) -> Int64s:
        """Scores, what they are held down to and lengths of those waiting, [3, n, 2]."""
        nothing = np.empty((3, 0, len(Role)), np.int64)
        return np.concatenate([nothing, *self._waiting], axis=1)


def _array_names(role: Role, kind: str) -> tuple[str, ...]:
    return tuple(f"{role.name.lower()}_{kind}_{each}" for each in ("lengths", "bins", "counts"))


def _added(tallies: tuple[Tally, ...], scores: Int32s, lengths: Int64s) -> tuple[Tally, ...]:
    """Tallies with scores and lengths [n, 2] added."""
    columns = zip(tallies, scores.T, lengths.T, strict=True)
    return tuple(tally.plus(of_role, length) for tally, of_role, length in columns)
