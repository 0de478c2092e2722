"""Made-up traffic whose scores have tails, for what policies promise in the long run."""

from dataclasses import replace

import numpy as np

from schemas.records import Segments

DIRECTIONS = 7


def traffic(n: int, seed: int, directions: int = DIRECTIONS) -> Segments:
    """Conversations of 1 to 12 segments; some lack a role. Each adds something to its cosines."""
    rng = np.random.default_rng(seed)
    present = rng.random((n, 2)) >= [0.05, 0.2]
    counts = rng.integers(1, 7, (n, 2)) * present
    row = np.repeat(np.arange(n), counts.sum(axis=1))
    role = np.repeat(np.tile([0, 1], n), counts.ravel())
    shape = (len(row), directions)
    common = rng.exponential(300, (n, 1))[row]
    middle = np.linspace(-800, 800, 2 * directions).reshape(2, directions)[role]
    high = middle + 1500 + common + rng.exponential(400, shape)
    low = middle - 1500 - common - rng.exponential(400, shape)
    first = np.searchsorted(row, np.arange(n))
    return Segments(
        n,
        row.astype(np.int32),
        role.astype(np.int8),
        ((np.arange(len(row)) - first[row]) * 64).astype(np.uint32),
        np.full(len(row), 64, np.uint8),
        np.rint(low).astype(np.int16),
        np.rint(high).astype(np.int16),
        rng.integers(0, 64, shape).astype(np.uint8),
        rng.integers(0, 64, shape).astype(np.uint8),
    )


def moved(segments: Segments, chosen: np.ndarray, direction: int, value: int) -> Segments:
    """With the highest cosine of a direction set, in the chosen segments."""
    high = segments.high.copy()
    high[chosen, direction] = value
    return replace(segments, high=high)
