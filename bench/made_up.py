"""Made-up cosines of made-up conversations, as many as are wanted."""

import numpy as np
from numpy.typing import NDArray

from schemas.records import STEPS_PER_UNIT, Int8s, Int16s, Role, Segments

_FREEDOM = 8
_DRAWN = 1 << 24
_FARTHEST = 15  # standard deviations: no value leaves int16


class Traffic:
    """Conversations of three or four segments, user and assistant in turns.

    Extremes are spread like those of 1,200 real conversations along the directions of the shipped
    organism: the means of series are 0.06 give or take 0.04, their standard deviations 0.019, and
    tails those of Student's t with 8 degrees of freedom (one in 10,000 is 5.6 standard deviations
    above the mean, of the real ones 5.0 for the user and 4.0 for the assistant).
    """

    def __init__(self, directions: int, seed: int = 0) -> None:
        self.directions = directions
        self._rng = np.random.default_rng(seed)
        shape = (len(Role), 2 * directions)
        spread = self._rng.lognormal(np.log(0.019), 0.25, shape).clip(0.005, 0.05)
        self._spread = (spread * STEPS_PER_UNIT).astype(np.float32)
        self._mean = (self._rng.normal(0.062, 0.042, shape) * STEPS_PER_UNIT).astype(np.float32)
        # Every segment is a stretch of these; a series sees the tails of one in sixteen million.
        drawn = self._rng.standard_t(_FREEDOM, _DRAWN) / (_FREEDOM / (_FREEDOM - 2)) ** 0.5
        self._drawn = drawn.clip(-_FARTHEST, _FARTHEST).astype(np.float32)

    def values(self, roles: Int8s) -> Int16s:
        """Values of segments in the series of their roles, steps, int16 [S, 2D]."""
        width = 2 * self.directions
        begins = self._rng.integers(0, _DRAWN - width, len(roles))
        values = np.stack([self._drawn[begin : begin + width] for begin in begins.tolist()])
        values *= self._spread[roles]
        values += self._mean[roles]
        return values.astype(np.int16)

    def packs(self, conversations: int, size: int) -> list[Segments]:
        """So many conversations, in packs of a size; the last one may be smaller."""
        sizes = [size] * (conversations // size) + [conversations % size]
        return [self.pack(each) for each in sizes if each]

    def pack(self, conversations: int) -> Segments:
        """Conversations as a batch of them leaves the scorer."""
        numbers = self._rng.integers(3, 5, conversations)
        row = np.repeat(np.arange(conversations, dtype=np.int32), numbers)
        place = np.arange(len(row)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        role = (place % len(Role)).astype(np.int8)
        values = self.values(role)
        high, low = values[:, : self.directions], -values[:, self.directions :]
        start, tokens = (64 * place).astype(np.uint32), np.full(len(row), 64, np.uint8)
        at: NDArray[np.uint8] = np.zeros(high.shape, np.uint8)
        return Segments(conversations, row, role, start, tokens, low, high, at, at)
