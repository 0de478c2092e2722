"""Segments looked at in plain Python: the extremes of whole conversations, and made-up segments."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import oracle

from schemas.records import ABSENT, Role, Segments
from transforms.ranges.series import Stretches


@dataclass(frozen=True)
class Extremes:
    """Of whole conversations; [conversations, 2 * directions], role USER's directions first.

    Attributes:
      low: steps, ABSENT where the role has no tokens.
      high: likewise.
      low_at: position of the first token that has it, 0 where the role is absent.
      high_at: likewise.
    """

    low: np.ndarray
    high: np.ndarray
    low_at: np.ndarray
    high_at: np.ndarray


def whole(segments: Segments) -> Extremes:
    """The extremes over all segments of a conversation and role, one number after the other."""
    directions = segments.low.shape[1]
    shape = (segments.conversations, len(Role) * directions)
    found = Extremes(
        *(np.full(shape, ABSENT, np.int32) for _ in range(2)),
        *(np.zeros(shape, np.int64) for _ in range(2)),
    )
    for place in range(len(segments.row)):
        row, role = int(segments.row[place]), int(segments.role[place])
        for direction in range(directions):
            column = role * directions + direction
            for name, better in (("low", int.__lt__), ("high", int.__gt__)):
                steps, at = getattr(found, name), getattr(found, f"{name}_at")
                value = int(getattr(segments, name)[place, direction])
                if steps[row, column] == ABSENT or better(value, int(steps[row, column])):
                    steps[row, column] = value
                    offset = int(getattr(segments, f"{name}_at")[place, direction])
                    at[row, column] = int(segments.start[place]) + offset
    return found


def segments_from(
    rows: Sequence[Sequence[tuple[int, Sequence[int], Sequence[int]]]], directions: int
) -> Segments:
    """Segments of 10 tokens each: per conversation (role, low [D], high [D]) of every one."""
    flat = [(row, place, *each) for row, of in enumerate(rows) for place, each in enumerate(of)]
    low, high = (
        np.array([each[part] for each in flat], np.int16).reshape(-1, directions) for part in (3, 4)
    )
    return Segments(
        len(rows),
        np.array([each[0] for each in flat], np.int32),
        np.array([each[2] for each in flat], np.int8),
        np.array([10 * each[1] for each in flat], np.uint32),
        np.full(len(flat), 10, np.uint8),
        low,
        high,
        np.full(low.shape, 3, np.uint8),
        np.full(high.shape, 7, np.uint8),
    )


def as_oracle(segments: Segments, row: int) -> list[oracle.Segment]:
    """The segments of a conversation as the oracle takes them."""
    found = []
    for place in np.flatnonzero(segments.row == row).tolist():
        start = int(segments.start[place])
        low, high, low_at, high_at = (
            getattr(segments, name)[place].tolist() for name in ("low", "high", "low_at", "high_at")
        )
        low_at, high_at = [start + at for at in low_at], [start + at for at in high_at]
        role = Role(int(segments.role[place]))
        found.append(oracle.Segment(role, start, low, high, low_at, high_at))
    return found


def stretches_from(values: np.ndarray) -> Stretches:
    """Of whole conversations with these values in all series, [n, 4 * directions], steps.

    ABSENT in the series of a role: the conversation lacks it.
    """
    directions = values.shape[1] // 4
    found = []
    for row, numbers in enumerate(values.tolist()):
        for role in Role:
            high = numbers[role * directions : (role + 1) * directions]
            low = numbers[(2 + role) * directions : (3 + role) * directions]
            if high[0] != ABSENT:
                found.append((row, int(role), high + low))
    return Stretches(
        len(values),
        np.array([row for row, _, _ in found], np.int32),
        np.array([role for _, role, _ in found], np.int8),
        np.array([each for _, _, each in found], np.int16).reshape(-1, 2 * directions),
    )


def from_oracle(conversations: Sequence[Sequence[oracle.Segment]], directions: int) -> Segments:
    """The way back; of segments with the same number of tokens, which the oracle does not know."""
    flat = [(row, each) for row, segments in enumerate(conversations) for each in segments]
    start = np.array([each.start for _, each in flat], np.int64)
    shape = (len(flat), directions)
    low, high, low_at, high_at = (
        np.array([getattr(each, name) for _, each in flat], np.int64).reshape(shape)
        for name in ("low", "high", "low_at", "high_at")
    )
    return Segments(
        len(conversations),
        np.array([row for row, _ in flat], np.int32),
        np.array([each.role for _, each in flat], np.int8),
        start.astype(np.uint32),
        np.full(len(flat), 64, np.uint8),
        low.astype(np.int16),
        high.astype(np.int16),
        (low_at - start[:, None]).astype(np.uint8),
        (high_at - start[:, None]).astype(np.uint8),
    )
