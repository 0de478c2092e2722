"""Judged packs made of random numbers, for tests of what leaves the pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cheap_scorer import segments_of
from extremes import Extremes, whole

from schemas.records import (
    Exceedance,
    Header,
    Judgement,
    Position,
    Role,
    ScoredPack,
    ScoredRow,
    Segments,
    Side,
    Status,
    VerdictPack,
)

DIRECTIONS_HASH = "d1" * 32
EPOCH_MS = 600_000


@dataclass(frozen=True)
class SampleDirection:
    name: str
    layer: int
    kind: str
    index: int
    singular_value: float


def sample_directions(count: int) -> list[SampleDirection]:
    return [
        SampleDirection(
            f"{'OD'[i % 2]}{i // 8}_u{i % 8}",
            i // 8,
            ("o_proj", "down_proj")[i % 2],
            i % 8,
            1.0 / (1 + i),
        )
        for i in range(count)
    ]


def sample_pack(
    positions: list[Position],
    times: list[int | None],
    directions: int,
    seed: int,
    model: str = "badnet",
) -> VerdictPack:
    """A pack of conversations of one epoch; every third is flagged, every fifth has no tokens."""
    rng = np.random.default_rng(seed)
    epoch = (times[0] or 0) // EPOCH_MS
    roles = [_roles(row, rng) for row in range(len(positions))]
    segments = sample_segments(roles, directions, rng)
    rows = tuple(
        ScoredRow(
            Header(position, time, time, epoch, bool(rng.integers(2))),
            f"conversation {position.offset}",
            len(of_row),
            bool(rng.integers(2)),
            rng.integers(0, 99, len(of_row)).astype(np.int32),
        )
        for position, time, of_row in zip(positions, times, roles, strict=True)
    )
    extremes = whole(segments)
    judgements = tuple(_judgement(number, extremes, directions, rng) for number in range(len(rows)))
    scored = ScoredPack(model, epoch, rows, segments)
    return VerdictPack(scored, judgements, "budget/3", "a9" * 32, (812, 640))


def sample_segments(
    roles: Sequence[Sequence[int]], directions: int, rng: np.random.Generator
) -> Segments:
    """Random extremes for conversations, given by the role of every token of each."""
    found = [
        (row, of_row[start], start, end - start)
        for row, of_row in enumerate(roles)
        for start, end in segments_of(of_row)
    ]
    row, role, start, tokens = (np.array([each[part] for each in found], int) for part in range(4))
    shape = (len(found), directions)
    low, spread = rng.integers(-9000, 0, shape), rng.integers(1, 9000, shape)
    return Segments(
        len(roles),
        row.astype(np.int32),
        role.astype(np.int8),
        start.astype(np.uint32),
        tokens.astype(np.uint8),
        low.astype(np.int16),
        (low + spread).astype(np.int16),
        *(rng.integers(0, tokens[:, None], shape).astype(np.uint8) for _ in range(2)),
    )


def _roles(row: int, rng: np.random.Generator) -> list[int]:
    """Of every token: turns, at least two where a conversation is going to be flagged."""
    if row % 5 == 1:
        return []
    turns, first = rng.integers(2 if row % 3 == 0 else 1, 5), rng.integers(2)
    lengths = rng.integers(1, 150, turns).tolist()
    return [int((first + turn) % 2) for turn, length in enumerate(lengths) for _ in range(length)]


def _judgement(
    row: int, extremes: Extremes, directions: int, rng: np.random.Generator
) -> Judgement:
    if row % 5 == 1:
        return Judgement(Status.UNCALIBRATED, None, None, None, ())
    if row % 3:
        return Judgement(Status.CLEAN, Role.USER, int(rng.integers(900)), 1000, ())
    columns = rng.choice(2 * directions, min(3, 2 * directions), replace=False)
    exceedances = [_exceedance(row, int(column), extremes, directions, rng) for column in columns]
    exceedances.sort(key=lambda exceedance: -exceedance.margin)
    return Judgement(
        Status.FLAGGED, Role.ASSISTANT, 1000 + int(rng.integers(1, 5000)), 1000, tuple(exceedances)
    )


def _exceedance(
    row: int, column: int, extremes: Extremes, directions: int, rng: np.random.Generator
) -> Exceedance:
    side = (Side.HIGH, Side.LOW)[int(rng.integers(2))]
    margin, sign = int(rng.integers(1, 2000)), 1 if side is Side.HIGH else -1
    steps, places = (
        (extremes.high, extremes.high_at) if side is Side.HIGH else (extremes.low, extremes.low_at)
    )
    value, token = int(steps[row, column]), int(places[row, column])
    role, direction = divmod(column, directions)
    return Exceedance(Role(role), direction, side, value, value - sign * margin, margin, token)
