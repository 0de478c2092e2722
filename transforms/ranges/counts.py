"""Counts of stretches' values: integer histograms with fixed bins, one per series.

What is promised, for any number of stretches:
- Adding and merging are exact, and their order does not matter: the same stretches give the same
  counts, bit for bit, however they were split up.
- The maximum is exact.
- A quantile is off from that of the raw values by at most the width of the wider of the two bins
  that hold its neighbouring order statistics: 32 steps (0.001 in cosine) at -4,096 steps (-0.125)
  and above, 512 steps (0.016) below, where upper tails hardly ever are.
- Memory is bounded: of 1,208 bins a series only those in use are kept, 12 bytes each, and the
  values of a few thousand stretches that are yet to be tallied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Int16s, Int32s, Role, Side
from transforms.ranges.histograms import Histograms
from transforms.ranges.series import PER_DIRECTION, Stretches, per_series

OWN_SHARE: Final = 2
"""How many times the asked share of a rare role's conversations may lie beyond a quantile."""

HELD: Final = 4096
"""Stretches that wait for being tallied together: one by one that costs twenty times as much."""

Int64s = NDArray[np.int64]
_OfRoles = tuple[Int16s, ...]
"""Values of stretches, [n, 2D] for each role."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Histograms and maxima of all series. Immutable: every change is a new object.

    Attributes:
      total: how many conversations the stretches were of, whatever their roles.
      stretches: how many were of each role, int64 [2]; the number of values in each of the role's
        series.
      maximum: largest value of each series in steps, int16 [4D]; ABSENT where there is none.
    """

    total: int
    stretches: Int64s
    maximum: Int16s
    _tallied: Histograms
    _held: tuple[_OfRoles, ...] = ()
    _waiting: int = 0  # stretches that are held

    def __post_init__(self) -> None:
        for array in (self.stretches, self.maximum):
            array.setflags(write=False)

    @staticmethod
    def empty(directions: int) -> "Counts":
        """Counts of nothing: merging them in changes nothing."""
        series = PER_DIRECTION * directions
        return Counts(
            0,
            np.zeros(len(Role), np.int64),
            np.full(series, ABSENT, np.int16),
            Histograms.empty(series),
        )

    @property
    def directions(self) -> int:
        """D, a quarter of the number of series."""
        return len(self.maximum) // PER_DIRECTION

    @cached_property
    def histograms(self) -> Histograms:
        """Of all series."""
        if not self._held:
            return self._tallied
        of_roles = [np.concatenate(of_role) for of_role in zip(*self._held, strict=True)]
        return self._tallied.plus(_blocks(of_roles, self.directions))

    @property
    def histogram(self) -> Int64s:
        """How many values each series has in each bin, int64 [4D, BINS]; made anew every time."""
        return self.histograms.dense()

    def plus(self, stretches: Stretches) -> "Counts":
        """With stretches added.

        Raises:
          ValueError: they have another number of series.
        """
        if 2 * stretches.values.shape[1] != len(self.maximum):
            raise ValueError(
                f"{stretches.values.shape[1]} series a role, expected {len(self.maximum) // 2}"
            )
        of_roles = tuple(stretches.values[stretches.role == role] for role in Role)
        blocks = _blocks(of_roles, self.directions)
        highest = np.concatenate([block.max(axis=0, initial=ABSENT) for block in blocks])
        counts = Counts(
            self.total + int(stretches.present().any(axis=1).sum()),
            self.stretches + np.bincount(stretches.role, minlength=len(Role)),
            np.maximum(self.maximum, highest),
            self._tallied,
            (*self._held, of_roles),
            self._waiting + len(stretches.role),
        )
        if counts._waiting < HELD:
            return counts
        return replace(counts, _tallied=counts.histograms, _held=(), _waiting=0)

    def merged(self, other: "Counts") -> "Counts":
        """The counts of both. Raises ValueError when the number of directions differs."""
        if self.directions != other.directions:
            raise ValueError(f"counts of {self.directions} and of {other.directions} directions")
        return Counts(
            self.total + other.total,
            self.stretches + other.stretches,
            np.maximum(self.maximum, other.maximum),
            self.histograms.merged(other.histograms),
        )

    def quantile(self, q: float) -> Int32s:
        """The q-quantile of every series (0 <= q <= 1) in steps, int32 [4D]; 0 where it is empty.

        Linear between order statistics like `numpy.quantile`; the module docstring says how close.
        """
        return self._between(q * self._last())

    def quantile_of_all(self, q: float) -> Int32s:
        """Like `quantile`, over conversations that may lack a role, when stretches are whole.

        Those without the role stand below all values, as they can exceed nothing. So a value beyond
        it is equally rare in every role. A role that few conversations have would be beyond it at
        every appearance; its bound is therefore at least the quantile of its own values beyond
        which twice the share lies.
        """
        last = self._last()
        among_all = q * (self.total - 1) - (self.total - 1 - last)
        among_own = (1 - OWN_SHARE * (1 - q)) * last
        return self._between(np.maximum(among_all, among_own))

    def _last(self) -> Int64s:
        """Rank of the largest value of every series, int64 [4D]; -1 where there is none."""
        return per_series(self.stretches, self.directions) - 1

    def _between(self, position: NDArray[np.floating[Any]]) -> Int32s:
        """Between the order statistics on either side of a 0-based rank [4D]."""
        last, position = self._last(), np.maximum(position, 0)
        below = np.floor(position).astype(np.int64)
        lower = self._order_statistic(below)
        upper = self._order_statistic(np.minimum(below + 1, np.maximum(last, 0)))
        estimate = np.rint(lower + (position - below) * (upper - lower)).astype(np.int32)
        return np.where(last < 0, 0, estimate)

    def _order_statistic(self, rank: Int64s) -> NDArray[np.float64]:
        """Estimate of the value with 0-based `rank` [4D] in each series, in steps [4D]."""
        estimate = np.minimum(self.histograms.order_statistics(rank), self.maximum)
        return np.where(rank == self._last(), self.maximum, estimate)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Compact form; the same counts always give the same arrays.

        Those of `Histograms.to_arrays`, `maximum` int16 [4D], `stretches` int64 [2] and `total`
        int64 [1].
        """
        return {
            **self.histograms.to_arrays(),
            "maximum": self.maximum,
            "stretches": self.stretches,
            "total": np.array([self.total], np.int64),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> "Counts":
        """Read back what `to_arrays` gave, or gave when it gave the rows of a sparse matrix.

        Raises:
          KeyError: an array is missing.
          ValueError: the arrays do not fit together.
        """
        read = Histograms.from_rows if "indptr" in arrays else Histograms.from_arrays
        histograms, maximum = read(arrays), arrays["maximum"].astype(np.int16)
        stretches, total = arrays["stretches"].astype(np.int64), int(arrays["total"][0])
        if len(maximum) != histograms.series:
            raise ValueError("histograms and maxima do not fit together")
        expected = per_series(stretches, len(maximum) // PER_DIRECTION)
        if not np.array_equal(histograms.sums(), expected) or total > stretches.sum():
            raise ValueError("histograms do not add up to the number of stretches")
        return Counts(total, stretches, maximum, histograms)


def _blocks(of_roles: Sequence[Int16s], directions: int) -> list[Int16s]:
    """Values of each role, [n, 2D], as those of each side's D series in the order of all series."""
    starts = [directions * place for place in range(len(Side))]
    return [of_role[:, start : start + directions] for start in starts for of_role in of_roles]
