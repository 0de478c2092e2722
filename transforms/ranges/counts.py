"""Counts of stretches' values: integer histograms with fixed bins, one per series.

What is promised, for any number of stretches:
- Adding and merging are exact, and their order does not matter: the same stretches give the same
  counts, bit for bit, however they were split up.
- The maximum is exact.
- A quantile is off from that of the raw values by at most the width of the wider of the two bins
  that hold its neighbouring order statistics: 32 steps (0.001 in cosine) at -4,096 steps (-0.125)
  and above, 512 steps (0.016) below, where upper tails hardly ever are.
- Memory is bounded: 1,208 bins a series, 9.7 KB (17 MB for 1,728 series). What is stored holds
  only bins in use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, STEPS_PER_UNIT, Int16s, Int32s, Role
from transforms.ranges.series import PER_DIRECTION, Stretches, per_series, series_of_role

FINE_WIDTH: Final = 32
COARSE_WIDTH: Final = 512
FINE_FROM: Final = -4096
"""Bins are fine from this value on, coarse below it."""

Int64s = NDArray[np.int64]

_EDGES: Final = np.concatenate(
    [
        np.arange(ABSENT, FINE_FROM, COARSE_WIDTH),
        np.arange(FINE_FROM, STEPS_PER_UNIT + 1, FINE_WIDTH),
        [STEPS_PER_UNIT + 1],
    ]
)
BINS: Final = len(_EDGES) - 1
OWN_SHARE: Final = 2
"""How many times the asked share of a rare role's conversations may lie beyond a quantile."""

_ROWS_AT_ONCE: Final = 1024  # bounds the index array that counting needs


_VALUES: Final = np.arange(ABSENT, STEPS_PER_UNIT + 1)
_BIN_OF: Final = (np.searchsorted(_EDGES, _VALUES, side="right") - 1).astype(np.int16)


@dataclass(frozen=True, eq=False)
class Counts:
    """Histograms and maxima of all series. Immutable: every change is a new object.

    Attributes:
      total: how many conversations the stretches were of, whatever their roles.
      stretches: how many were of each role, int64 [2]; the number of values in each of the role's
        series.
      maximum: largest value of each series in steps, int16 [4D]; ABSENT where there is none.
      histogram: int64 [4D, BINS].
    """

    total: int
    stretches: Int64s
    maximum: Int16s
    histogram: Int64s

    def __post_init__(self) -> None:
        for array in (self.stretches, self.maximum, self.histogram):
            array.setflags(write=False)

    @staticmethod
    def empty(directions: int) -> "Counts":
        """Counts of nothing: merging them in changes nothing."""
        series = PER_DIRECTION * directions
        return Counts(
            0,
            np.zeros(len(Role), np.int64),
            np.full(series, ABSENT, np.int16),
            np.zeros((series, BINS), np.int64),
        )

    @property
    def directions(self) -> int:
        """D, a quarter of the number of series."""
        return len(self.maximum) // PER_DIRECTION

    def plus(self, stretches: Stretches) -> "Counts":
        """With stretches added.

        Raises:
          ValueError: they have another number of series.
        """
        if 2 * stretches.values.shape[1] != len(self.maximum):
            raise ValueError(
                f"{stretches.values.shape[1]} series a role, expected {len(self.maximum) // 2}"
            )
        histogram, maximum = self.histogram.copy(), self.maximum.copy()
        for role in Role:
            values = stretches.values[stretches.role == role]
            series = series_of_role(role, self.directions)
            for start in range(0, len(values), _ROWS_AT_ONCE):
                _tally(histogram, values[start : start + _ROWS_AT_ONCE], series)
            maximum[series] = np.maximum(maximum[series], values.max(axis=0, initial=ABSENT))
        return Counts(
            self.total + int(stretches.present().any(axis=1).sum()),
            self.stretches + np.bincount(stretches.role, minlength=len(Role)),
            maximum,
            histogram,
        )

    def merged(self, other: "Counts") -> "Counts":
        """The counts of both. Raises ValueError when the number of directions differs."""
        if self.directions != other.directions:
            raise ValueError(f"counts of {self.directions} and of {other.directions} directions")
        return Counts(
            self.total + other.total,
            self.stretches + other.stretches,
            np.maximum(self.maximum, other.maximum),
            self.histogram + other.histogram,
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
        cumulative = np.cumsum(self.histogram, axis=1)
        lower = self._order_statistic(cumulative, below)
        upper = self._order_statistic(cumulative, np.minimum(below + 1, np.maximum(last, 0)))
        estimate = np.rint(lower + (position - below) * (upper - lower)).astype(np.int32)
        return np.where(last < 0, 0, estimate)

    def _order_statistic(self, cumulative: Int64s, rank: Int64s) -> NDArray[np.float64]:
        """Estimate of the value with 0-based `rank` [4D] in each series, in steps [4D]."""
        series = np.arange(len(rank))
        bins = np.minimum((cumulative <= rank[:, None]).sum(axis=1), BINS - 1)
        count = np.maximum(self.histogram[series, bins], 1)
        place = rank - (cumulative[series, bins] - count)
        width = _EDGES[bins + 1] - _EDGES[bins]
        # A bin's values are taken to lie evenly over its integers.
        estimate = _EDGES[bins] - 0.5 + width * (place + 0.5) / count
        is_largest = rank == cumulative[:, -1] - 1
        return np.where(is_largest, self.maximum, np.minimum(estimate, self.maximum))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Compact form: only bins in use, as the rows of a compressed sparse matrix.

        `indptr` uint32 [4D + 1], `bins` uint16 [used], `counts` [used] in the narrowest unsigned
        type that holds the largest, `maximum` int16 [4D], `stretches` int64 [2], `total` int64
        [1]. The same counts always give the same arrays.
        """
        used = np.flatnonzero(self.histogram)
        counts = self.histogram.ravel()[used]
        narrowest = np.min_scalar_type(int(counts.max(initial=0)))
        starts = np.arange(len(self.maximum) + 1) * BINS
        return {
            "indptr": np.searchsorted(used, starts).astype(np.uint32),
            "bins": (used % BINS).astype(np.uint16),
            "counts": counts.astype(narrowest),
            "maximum": self.maximum,
            "stretches": self.stretches,
            "total": np.array([self.total], np.int64),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> "Counts":
        """Read back what `to_arrays` gave.

        Raises:
          KeyError: an array is missing.
          ValueError: the arrays do not fit together.
        """
        maximum = arrays["maximum"].astype(np.int16)
        histogram = np.zeros((len(maximum), BINS), np.int64)
        indptr = arrays["indptr"].astype(np.int64)
        row = np.repeat(np.arange(len(maximum)), indptr[1:] - indptr[:-1])
        bins = arrays["bins"]
        if len(row) != len(bins) or (bins >= BINS).any():
            raise ValueError("histogram rows and bins do not fit together")
        histogram[row, bins] = arrays["counts"]
        stretches, total = arrays["stretches"].astype(np.int64), int(arrays["total"][0])
        expected = per_series(stretches, len(maximum) // PER_DIRECTION)
        if not np.array_equal(histogram.sum(axis=1), expected) or total > stretches.sum():
            raise ValueError("histograms do not add up to the number of stretches")
        return Counts(total, stretches, maximum, histogram)


def _tally(histogram: Int64s, values: Int16s, series: NDArray[np.intp]) -> None:
    """Count values [n, k] of k series in a histogram [4D, BINS], in place."""
    bins = _BIN_OF[values.astype(np.intp) - ABSENT] + series * BINS
    np.add.at(histogram.reshape(-1), bins.ravel(), 1)
