"""What every log is to its readers: partitions of entries at ascending offsets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from schemas.errors import TransientError


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it stands in the log."""

    offset: int
    next_offset: int  # the smallest offset at which the next entry may stand
    timestamp: int | None  # the log's own, ms since 1970 UTC; None: it keeps none
    value: bytes | None  # None: a tombstone


class Log(Protocol):
    """A log that can be read again and again from any offset."""

    @property
    def uri(self) -> str:
        """Where it can be read."""
        ...

    @property
    def source(self) -> str:
        """Its name in positions, the same wherever and whenever it is read."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether it has an end that does not move."""
        ...

    @property
    def timestamped(self) -> bool:
        """Whether entries carry a time of their own."""
        ...

    def partitions(self) -> list[int]:
        """The partitions there are now."""
        ...

    def start(self, partition: int) -> int:
        """The first offset to read."""
        ...

    def end(self, partition: int) -> int:
        """The offset after the last entry to read; grows unless the log is bounded."""
        ...

    def earliest(self, partition: int) -> int:
        """The first offset that is kept."""
        ...

    def read(self, partition: int, start: int, end: int) -> Iterator[Entry]:
        """Entries at offsets [start, end), ascending; closing the iterator early is fine.

        Raises:
          LogError: the log cannot be read on; nothing is passed over in silence.
        """
        ...


class LogError(TransientError):
    """A log that was there cannot be read on, for now."""
