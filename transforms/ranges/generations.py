"""Generations: which day an epoch is of, and which days' conversations ranges are made of.

What was counted on a day is kept by itself, so that it can be left out again as a whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

DAY_MS: Final = 24 * 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Calendar:
    """Days, counted from 1970; an epoch that is longer than a day is a generation of its own.

    Attributes:
      epoch_ms: length of an epoch.
      keep_days: how long a generation stays in the ranges besides the one that is being counted.
    """

    epoch_ms: int
    keep_days: int = 30

    def generation(self, epoch: int) -> int:
        """The generation in which an epoch begins."""
        return self.generation_at(epoch * self.epoch_ms)

    def generation_at(self, time: int) -> int:
        """That of a time, in milliseconds since 1970 UTC."""
        return time // self._length

    def begin(self, generation: int) -> int:
        """When it begins, in milliseconds since 1970 UTC."""
        return generation * self._length

    def last_epoch(self, epoch: int) -> int:
        """The last epoch of an epoch's generation."""
        return (self.begin(self.generation(epoch) + 1) - 1) // self.epoch_ms

    def expired(self, held: Iterable[int], epoch: int) -> list[int]:
        """Those of some generations that no longer count when an epoch begins, oldest first."""
        return sorted(each for each in held if each < self.generation(epoch) - self.kept)

    @property
    def kept(self) -> int:
        """How many generations that is."""
        return -(-self.keep_days * DAY_MS // self._length)

    @property
    def _length(self) -> int:
        return max(DAY_MS, self.epoch_ms)
