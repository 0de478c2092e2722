"""What a job left and what the oracle expects, in forms that can be compared."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import oracle
from outcome import Row

from schemas.records import ABSENT, STEPS_PER_UNIT, Role, Side
from transforms.ranges.ranges import Ranges
from transforms.ranges.scores import Tally


def row_of(row: Row) -> tuple[Any, ...]:
    return (
        (row["partition"], row["offset"], row["epoch"], row["late"], row["tokens"]),
        row["effective_time"],
        row["date"],
        row["status"],
        _steps(row["score"]),
        _steps(row["threshold"]),
        row["low"],
        row["high"],
        list(zip(row["segment_role"], row["segment_start"], strict=True)),
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
        *map(list, _extremes(entry.segments or ())),
        [(each.role, each.start) for each in entry.segments or ()],
    )


def exceedance_of(row: Row) -> tuple[Any, ...]:
    series = (row["role"], row["layer"], row["side"])
    numbers = (_steps(row["value"]), _steps(row["bound"]), _steps(row["margin"]))
    return (row["partition"], row["offset"], series, numbers, row["token_start"])


def exceedances_of(verdict: oracle.Verdict) -> list[tuple[Any, ...]]:
    place = (verdict.entry.partition, verdict.entry.offset)
    return [
        (*place, (e.role.name.lower(), e.direction, e.side), (e.value, e.bound, e.margin), e.token)
        for e in verdict.judgement.exceedances
    ]


def assert_ranges(ranges: Ranges, memory: oracle.Memory) -> None:
    """The ranges after the last epoch hold what the oracle remembers."""
    names = [(r, d, s) for s in Side for r in Role for d in range(memory.directions)]
    for counts, values in (
        (ranges.segments, memory.segments),
        (ranges.conversations, memory.conversations),
    ):
        raw = [values[name] for name in names]
        assert counts.maximum.tolist() == [max(each) for each in raw]
        assert counts.histogram.sum(axis=1).tolist() == [len(each) for each in raw]
        assert counts.total == memory.total
    for role in Role:
        scores, found = ranges.scores, memory.scores[role]
        kept = [(each.segments, each.score) for each in found if each.held is None]
        held = [(each.segments, each.held) for each in found if each.held is not None]
        assert _counted(scores.kept[role]) == _pairs(kept)
        assert _counted(scores.held[role]) == _pairs(held)
        assert scores.absent[role] == memory.without[role]


def _counted(tally: Tally) -> list[tuple[int, ...]]:
    """Length and bin of every score."""
    pairs = np.repeat(np.stack([tally.lengths, tally.bins], axis=1), tally.counts, axis=0)
    return [tuple(pair) for pair in pairs.tolist()]


def _pairs(scores: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    return sorted((n.bit_length() - 1, score // oracle.SCORE_BIN) for n, score in scores)


def _extremes(segments: Sequence[oracle.Segment]) -> tuple[list[int], list[int]]:
    """Lowest and highest of whole conversations, role USER's directions first."""
    low, high = [], []
    for role in Role:
        of_role = [each for each in segments if each.role is role]
        absent = [[ABSENT] * len(segments[0].low)]
        low += map(min, zip(*([each.low for each in of_role] or absent), strict=True))
        high += map(max, zip(*([each.high for each in of_role] or absent), strict=True))
    return low, high


def _steps(cosine: float | None) -> int | None:
    return None if cosine is None else round(cosine * STEPS_PER_UNIT)
