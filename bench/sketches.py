"""Sketches of the DataSketches library beside the counts of ranges, on the same values."""

import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import datasketches
import numpy as np
from numpy.typing import NDArray

from bench.made_up import Traffic
from schemas.records import STEPS_PER_UNIT, Int16s, Role
from transforms.ranges.counts import Counts
from transforms.ranges.series import Stretches, series_of_role

DIRECTIONS = 50  # of the user only, so twice as many series
AT_ONCE = 4096
PARTS = 8

Figures = dict[str, float]


class Kind(NamedTuple):
    """A way to keep the distributions of S series; all take values int16 [n, S].

    Attributes:
      name: with what decides how fine it is.
      made: of values.
      quantile: of all series, [S] in steps.
      merged: one of several.
      stored: as bytes.
    """

    name: str
    made: Callable[[Int16s], Any]
    quantile: Callable[[Any, float], NDArray[Any]]
    merged: Callable[[Sequence[Any]], Any]
    stored: Callable[[Any], bytes]


def compare(values: int) -> Figures:
    """Put all kinds to the test with so many values a series; prints a table."""
    steps = Traffic(DIRECTIONS, seed=1).values(np.full(values, Role.USER, np.int8))
    print(f"\n{values:,} values of {steps.shape[1]} series each")
    columns = ("off at 0.99", "most", "off at 0.999", "most", "bytes", "values/s")
    asked = ("repeats", "exact merge", "any order")
    print(f"{'':14}" + "".join(f"{each:>13}" for each in (*columns, *asked)))
    return {name: value for kind in _kinds() for name, value in _tested(kind, steps).items()}


def _tested(kind: Kind, values: Int16s) -> Figures:
    started = time.process_time()
    made = kind.made(values)
    spent = time.process_time() - started
    off = [_off(kind, made, values, q) for q in (0.99, 0.999)]
    size, speed = len(kind.stored(made)) / values.shape[1], values.size / spent
    parts = [kind.made(part) for part in np.array_split(values, PARTS)]
    one, other = kind.merged(parts), kind.merged(parts[::-1])
    whole = kind.stored(made)
    told = [
        kind.stored(kind.made(values)) == whole,
        kind.stored(one) == whole,
        kind.stored(one) == kind.stored(other),
    ]
    numbers = "".join(f"{mean:>13.5f}{most:>13.5f}" for mean, most in off)
    answers = "".join(f"{'yes' if each else 'no':>13}" for each in told)
    print(f"{kind.name:14}{numbers}{size:>13,.0f}{speed:>13,.0f}{answers}", flush=True)
    key = kind.name.lower().replace(" ", "_")
    return {f"{key}_off_at_999": round(off[1][1], 5), f"{key}_bytes": round(size)}


def _off(kind: Kind, made: Any, values: Int16s, q: float) -> tuple[float, float]:
    """How far estimates are from numpy's quantiles of all values, in cosine: mean and most."""
    off = np.abs(kind.quantile(made, q) - np.quantile(values, q, axis=0)) / STEPS_PER_UNIT
    return float(off.mean()), float(off.max())


def _kinds() -> list[Kind]:
    counts = Kind("counts", _counted, _of_user, partial(reduce, Counts.merged), _bytes_of)
    return [
        counts,
        _sketch("KLL 200", partial(datasketches.kll_floats_sketch, 200)),
        _sketch("KLL 2000", partial(datasketches.kll_floats_sketch, 2000)),
        _sketch("REQ 12", partial(datasketches.req_floats_sketch, 12)),
        _sketch("REQ 50", partial(datasketches.req_floats_sketch, 50)),
        _sketch("t-digest 200", partial(datasketches.tdigest_float, 200)),
        _sketch("t-digest 1000", partial(datasketches.tdigest_float, 1000)),
    ]


def _counted(values: Int16s) -> Counts:
    counts = Counts.empty(DIRECTIONS)
    for start in range(0, len(values), AT_ONCE):
        part = values[start : start + AT_ONCE]
        role = np.full(len(part), Role.USER, np.int8)
        counts = counts.plus(Stretches(len(part), np.arange(len(part), dtype=np.int32), role, part))
    return counts


def _of_user(counts: Counts, q: float) -> NDArray[Any]:
    return counts.quantile(q)[series_of_role(Role.USER, DIRECTIONS)]


def _bytes_of(counts: Counts) -> bytes:
    return b"".join(array.tobytes() for array in counts.to_arrays().values())


def _sketch(name: str, empty: Callable[[], Any]) -> Kind:
    """A kind that has a sketch for every series."""

    def made(values: Int16s) -> list[Any]:
        sketches = [empty() for _ in range(values.shape[1])]
        for start in range(0, len(values), AT_ONCE):
            part = np.ascontiguousarray(values[start : start + AT_ONCE].T, np.float32)
            for sketch, column in zip(sketches, part, strict=True):
                sketch.update(column)
        return sketches

    def quantile(sketches: list[Any], q: float) -> NDArray[Any]:
        return np.array([sketch.get_quantile(q) for sketch in sketches])

    def merged(parts: Sequence[list[Any]]) -> list[Any]:
        sketches = [empty() for _ in parts[0]]
        for part in parts:
            for sketch, other in zip(sketches, part, strict=True):
                sketch.merge(other)
        return sketches

    def stored(sketches: list[Any]) -> bytes:
        return b"".join(sketch.serialize() for sketch in sketches)

    return Kind(name, made, quantile, merged, stored)
