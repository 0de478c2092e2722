"""Integer histograms of many series over the same fixed bins, of which only those in use are kept.

Adding values and merging are exact, and their order does not matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, STEPS_PER_UNIT, Int16s, Int32s
from transforms.ranges.leb128 import decoded, encoded

FINE_WIDTH: Final = 32
COARSE_WIDTH: Final = 512
FINE_FROM: Final = -4096
"""Bins are fine from this value on, coarse below it."""

Int64s = NDArray[np.int64]
Arrays = Mapping[str, NDArray[Any]]

_EDGES: Final = np.concatenate(
    [
        np.arange(ABSENT, FINE_FROM, COARSE_WIDTH),
        np.arange(FINE_FROM, STEPS_PER_UNIT + 1, FINE_WIDTH),
        [STEPS_PER_UNIT + 1],
    ]
)
BINS: Final = len(_EDGES) - 1

# By the 16 bits of a value, so that looking it up takes no arithmetic.
_VALUES: Final = np.arange(1 << 16).astype(np.uint16).view(np.int16)
_BIN_OF: Final = (np.searchsorted(_EDGES, _VALUES, side="right") - 1).astype(np.int16)

# What is tallied at once: few enough for the caches, enough to make up for the calls.
_COLUMNS: Final = 64
_ROWS: Final = 4096


@dataclass(frozen=True, eq=False)
class Histograms:
    """Immutable: every change is a new object.

    Attributes:
      series: how many there are.
      places: series * BINS + bin of all bins in use, int32 [used], ascending.
      numbers: how many values are in each of them, int64 [used], at least 1.
    """

    series: int
    places: Int32s
    numbers: Int64s

    def __post_init__(self) -> None:
        for array in (self.places, self.numbers):
            array.setflags(write=False)

    @staticmethod
    def empty(series: int) -> "Histograms":
        """Histograms of nothing."""
        return Histograms(series, np.empty(0, np.int32), np.empty(0, np.int64))

    def plus(self, blocks: Sequence[Int16s]) -> "Histograms":
        """With values counted.

        Args:
          blocks: values in steps, [n, k] of the next k series; n differs from block to block.
        """
        begins = np.cumsum([0, *(block.shape[1] for block in blocks)]).tolist()
        tallied = [
            part
            for first, block in zip(begins, blocks, strict=False)
            for part in _parts(first, block)
        ]
        return self._with(tallied)

    def merged(self, other: "Histograms") -> "Histograms":
        """The histograms of both, which have the same number of series."""
        return self._with([(other.places, other.numbers)])

    def sums(self) -> Int64s:
        """How many values each series has, int64 [series]."""
        return self._before[self._begins[1:]] - self._before[self._begins[:-1]]

    def order_statistics(self, rank: Int64s) -> NDArray[np.float64]:
        """Estimates of the values with a 0-based rank each, [series] in steps.

        A bin's values are taken to lie evenly over its integers. What stands for a series without
        values means nothing.
        """
        if not len(self.places):
            return np.zeros(self.series)
        wanted = self._before[self._begins[:-1]] + rank
        place = np.searchsorted(self._before[1:], wanted, side="right")
        place = np.clip(place, 0, self._begins[1:] - 1)
        bins, numbers = self.places[place] % BINS, self.numbers[place]
        width = _EDGES[bins + 1] - _EDGES[bins]
        return _EDGES[bins] - 0.5 + width * (wanted - self._before[place] + 0.5) / numbers

    def dense(self) -> Int64s:
        """How many values are in each bin, int64 [series, BINS]."""
        found = np.zeros(self.series * BINS, np.int64)
        found[self.places] = self.numbers
        return found.reshape(self.series, BINS)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Compact form; the same histograms always give the same arrays.

        `used` uint16 [series]: how many bins each series uses; and as bytes of LEB128 `counts`: for
        each of these twice the number of its values, and 1 more where bins before it are skipped;
        `gaps`: how many, for each of those where any are.
        """
        bins = self.places % BINS
        skipped = np.diff(bins, prepend=-1) - 1
        firsts = self._begins[:-1][np.diff(self._begins) > 0]
        skipped[firsts] = bins[firsts]
        return {
            "used": np.diff(self._begins).astype(np.uint16),
            "counts": encoded(2 * self.numbers + (skipped > 0)),
            "gaps": encoded(skipped[skipped > 0].astype(np.int64)),
        }

    @staticmethod
    def from_arrays(arrays: Arrays) -> "Histograms":
        """Read back what `to_arrays` gave.

        Raises:
          KeyError: an array is missing.
          ValueError: the arrays do not fit together.
        """
        used, counts = arrays["used"].astype(np.int64), decoded(arrays["counts"])
        is_gapped = counts % 2 == 1
        gaps = decoded(arrays["gaps"])
        if used.sum() != len(counts) or is_gapped.sum() != len(gaps) or (gaps > BINS).any():
            raise ValueError("numbers of bins do not fit together")
        steps = np.ones(len(counts), np.int64)
        steps[is_gapped] += gaps
        reached = np.concatenate([[0], np.cumsum(steps)])
        before = reached[np.cumsum(used) - used]
        return _checked(used, reached[1:] - np.repeat(before, used) - 1, counts >> 1)

    @staticmethod
    def from_rows(arrays: Arrays) -> "Histograms":
        """Read the rows of a compressed sparse matrix, `indptr`, `bins` and `counts`.

        Raises: like `from_arrays`.
        """
        indptr = arrays["indptr"].astype(np.int64)
        used = indptr[1:] - indptr[:-1]
        bins, counts = (arrays[name].astype(np.int64) for name in ("bins", "counts"))
        if (used < 0).any() or not used.sum() == len(bins) == len(counts):
            raise ValueError("numbers of bins do not fit together")
        return _checked(used, bins, counts)

    @cached_property
    def _begins(self) -> NDArray[np.intp]:
        """Where each series begins in `places`, and where the last one ends, [series + 1]."""
        return np.searchsorted(self.places, np.arange(self.series + 1) * BINS)

    @cached_property
    def _before(self) -> Int64s:
        """Values in all bins before each, and in all, [used + 1]."""
        return np.concatenate([[0], np.cumsum(self.numbers)])

    def _with(self, parts: Sequence[tuple[Int32s, Int64s]]) -> "Histograms":
        """With what is in further places, ascending in each part."""
        places = np.concatenate([self.places, *(places for places, _ in parts)])
        numbers = np.concatenate([self.numbers, *(numbers for _, numbers in parts)])
        order = np.argsort(places, kind="stable")  # fast, as it is made of a few ascending runs
        places = places[order]
        firsts = np.flatnonzero(np.diff(places, prepend=-1))
        return Histograms(self.series, places[firsts], np.add.reduceat(numbers[order], firsts))


def _parts(first: int, block: Int16s) -> Iterator[tuple[Int32s, Int64s]]:
    """Places in use, and their numbers, of the series from `first` on; a few series at a time."""
    rows, columns = block.shape
    for begin in range(0, columns if rows else 0, _COLUMNS):
        for row in range(0, rows, _ROWS):
            values = block[row : row + _ROWS, begin : begin + _COLUMNS]
            yield _tallied(first + begin, _BIN_OF.take(values.view(np.uint16)))


def _tallied(first: int, bins: Int16s) -> tuple[Int32s, Int64s]:
    """Places in use, and their numbers, of bins [n, k] of the k series from `first` on."""
    lowest = int(bins.min())
    span = int(bins.max()) - lowest + 1
    offsets = np.arange(bins.shape[1]) * span - lowest
    numbers = np.bincount(np.add(bins, offsets, dtype=np.intp).ravel())
    used = np.flatnonzero(numbers)
    series, above = np.divmod(used, span)
    return ((first + series) * BINS + lowest + above).astype(np.int32), numbers[used]


def _checked(used: Int64s, bins: Int64s, numbers: Int64s) -> Histograms:
    places = np.repeat(np.arange(len(used)), used) * BINS + bins
    in_order = (np.diff(places, prepend=-1) > 0).all()
    if not in_order or (bins < 0).any() or (bins >= BINS).any() or (numbers < 1).any():
        raise ValueError("histogram rows and bins do not fit together")
    return Histograms(len(used), places.astype(np.int32), numbers)
