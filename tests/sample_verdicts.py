"""Judged packs made of random numbers, for tests of what leaves the pipeline."""

from dataclasses import dataclass

import numpy as np

from schemas.records import (
    Cosines,
    Exceedance,
    Header,
    Judgement,
    Position,
    Role,
    ScoredPack,
    ScoredRow,
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
    """A pack of conversations of one epoch; every third is flagged, every fifth uncalibrated."""
    rng = np.random.default_rng(seed)
    epoch = (times[0] or 0) // EPOCH_MS
    shape = (len(positions), 2 * directions)
    low, spread = rng.integers(-9000, 0, shape), rng.integers(1, 9000, shape)
    cosines = Cosines(
        low.astype(np.int16),
        (low + spread).astype(np.int16),
        rng.integers(0, 300, shape).astype(np.uint32),
        rng.integers(0, 300, shape).astype(np.uint32),
    )
    rows = tuple(
        ScoredRow(
            Header(position, time, time, epoch, bool(rng.integers(2))),
            f"conversation {position.offset}",
            int(rng.integers(1, 999)),
            bool(rng.integers(2)),
            rng.integers(0, 99, 300).astype(np.int32),
        )
        for position, time in zip(positions, times, strict=True)
    )
    judgements = tuple(_judgement(number, cosines, directions, rng) for number in range(len(rows)))
    return VerdictPack(ScoredPack(model, epoch, rows, cosines), judgements, "budget/1", "a9" * 32)


def _judgement(row: int, cosines: Cosines, directions: int, rng: np.random.Generator) -> Judgement:
    if row % 5 == 1:
        return Judgement(Status.UNCALIBRATED, None, None, None, ())
    if row % 3:
        return Judgement(Status.CLEAN, Role.USER, int(rng.integers(900)), 1000, ())
    columns = rng.choice(2 * directions, min(3, 2 * directions), replace=False)
    exceedances = [_exceedance(row, int(column), cosines, directions, rng) for column in columns]
    exceedances.sort(key=lambda exceedance: -exceedance.margin)
    return Judgement(
        Status.FLAGGED, Role.ASSISTANT, 1000 + int(rng.integers(1, 5000)), 1000, tuple(exceedances)
    )


def _exceedance(
    row: int, column: int, cosines: Cosines, directions: int, rng: np.random.Generator
) -> Exceedance:
    side = (Side.HIGH, Side.LOW)[int(rng.integers(2))]
    margin, sign = int(rng.integers(1, 2000)), 1 if side is Side.HIGH else -1
    value = int((cosines.high if side is Side.HIGH else cosines.low)[row, column])
    role, direction = divmod(column, directions)
    return Exceedance(Role(role), direction, side, value, value - sign * margin, margin)
