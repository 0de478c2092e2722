"""What a job left and what the oracle expects, in forms that can be compared."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import oracle
from outcome import Row

from schemas.records import STEPS_PER_UNIT, Side
from transforms.ranges.ranges import Ranges


def row_of(row: Row) -> tuple[Any, ...]:
    return (
        (row["partition"], row["offset"], row["epoch"], row["late"], row["tokens"]),
        row["effective_time"],
        row["date"],
        row["status"],
        _steps(row["score"]),
        _steps(row["threshold"]),
        (row["low"], row["high"]),
    )


def row_of_verdict(verdict: oracle.Verdict) -> tuple[Any, ...]:
    entry, judgement = verdict.entry, verdict.judgement
    time = datetime.fromtimestamp(verdict.effective_time / 1000, UTC)
    return (
        (entry.partition, entry.offset, verdict.epoch, verdict.late, entry.tokens),
        time,
        time.date().isoformat(),
        judgement.status,
        judgement.score,
        judgement.threshold,
        (entry.low, entry.high),
    )


def exceedance_of(row: Row) -> tuple[Any, ...]:
    series = (row["role"], row["layer"], row["side"])
    numbers = (_steps(row["value"]), _steps(row["bound"]), _steps(row["margin"]))
    return (row["partition"], row["offset"], series, numbers)


def exceedances_of(verdict: oracle.Verdict) -> list[tuple[Any, ...]]:
    place = (verdict.entry.partition, verdict.entry.offset)
    return [
        (*place, (e.role.name.lower(), e.direction, e.side), (e.value, e.bound, e.margin))
        for e in verdict.judgement.exceedances
    ]


def assert_ranges(ranges: Ranges, memory: oracle.Memory) -> None:
    """The ranges after the last epoch hold what the oracle remembers."""
    names = [(r, d, s) for s in Side for r in (0, 1) for d in range(memory.directions)]
    raw = [memory.values[name] for name in names]
    assert ranges.counts.maximum.tolist() == [max(values) for values in raw]
    assert ranges.counts.histogram.sum(axis=1).tolist() == [len(values) for values in raw]
    for role, tally in enumerate(ranges.scores.roles):
        bins = np.repeat(tally.bins, tally.counts).tolist()
        assert bins == sorted(score // oracle.SCORE_BIN for score in memory.scores[role])
        assert ranges.scores.absent[role] == memory.without[role]


def _steps(cosine: float | None) -> int | None:
    return None if cosine is None else round(cosine * STEPS_PER_UNIT)
