"""When a record happened, and the effective time that decides its epoch.

Effective time is max(record time, running maximum of the record times before it in its
partition): monotone and a function of the partition alone, so an epoch is one contiguous range
of offsets, whatever the order in which partitions are read.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from transforms import json_text
from transforms.logs.entries import Entry

_MILLISECOND = timedelta(milliseconds=1)

MAX_AHEAD_MS = 600_000
"""A time further ahead of the plan's clock than this is not believed."""

_MS_FROM = 10**11
"""Numbers from here on are milliseconds (1973), below it seconds (until the year 5138)."""


class UndatedError(ValueError):
    """A record of a dated log without a usable time; the message says why."""


@dataclass(frozen=True)
class EventTime:
    """Where a record's time is found.

    Attributes:
      field: dotted path in the JSON payload; None: the log's own timestamp.
    """

    field: str | None

    def of(self, entry: Entry) -> int:
        """The record's time, ms since 1970 UTC. Raises UndatedError."""
        if self.field is None:
            if entry.timestamp is None:
                raise UndatedError("the log has no timestamp for it")
            return entry.timestamp
        return _milliseconds(_payload_field(entry.value, self.field), self.field)


@dataclass(frozen=True, slots=True)
class Dating:
    """What is known of a record's time. Epoch is None where nothing in the partition is dated."""

    event_time: int | None
    effective_time: int | None
    epoch: int | None
    late: bool = False
    error: str | None = None


class EpochClock:
    """Dates the records of one partition in order; the planner and the reader both use it."""

    def __init__(
        self, event_time: EventTime, epoch_ms: int, running_max: int | None, plan_ms: int
    ) -> None:
        """Begin where `running_max` is the largest record time so far, by a plan's clock."""
        self.running_max = running_max
        self._event_time = event_time
        self._epoch_ms = epoch_ms
        self._latest = plan_ms + MAX_AHEAD_MS

    def date(self, entry: Entry) -> Dating:
        """Date the next record; one that cannot be dated does not move the running maximum."""
        try:
            time = self._believable(entry)
        except UndatedError as error:
            return Dating(None, self.running_max, self.epoch, error=str(error))
        late = self.running_max is not None and time // self._epoch_ms < self._of(self.running_max)
        self.running_max = time if self.running_max is None else max(self.running_max, time)
        return Dating(time, self.running_max, self.epoch, late)

    @property
    def epoch(self) -> int | None:
        """Of the running maximum."""
        return None if self.running_max is None else self._of(self.running_max)

    def _believable(self, entry: Entry) -> int:
        time = self._event_time.of(entry)
        if time > self._latest:
            ahead = (time - self._latest + MAX_AHEAD_MS) // 1000
            raise UndatedError(f"its time {time} is {ahead} s after the clock")
        if time < 0:
            raise UndatedError(f"its time {time} is before 1970")
        return time

    def _of(self, time: int) -> int:
        return time // self._epoch_ms


class NoClock:
    """Stands for `EpochClock` where a log has no times: everything is epoch 0."""

    running_max = None
    epoch = 0

    def date(self, entry: Entry) -> Dating:
        """No times, no error."""
        return Dating(None, None, 0)


def clock_for(
    event_time: EventTime, timestamped: bool, epoch_ms: int, running_max: int | None, plan_ms: int
) -> EpochClock | NoClock:
    """The clock of a partition; `timestamped`: whether its log has times of its own."""
    if event_time.field is None and not timestamped:
        return NoClock()
    return EpochClock(event_time, epoch_ms, running_max, plan_ms)


def _payload_field(value: bytes | None, path: str) -> object:
    try:
        found: object = json_text.load(value or b"")
    except ValueError:
        raise UndatedError("it is not JSON that could hold a time") from None
    for name in path.split("."):
        if not isinstance(found, dict) or name not in found:
            raise UndatedError(f"it has no field {path}")
        found = found[name]
    return found


def _milliseconds(value: object, path: str) -> int:
    try:
        if isinstance(value, str):
            return _from_iso(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return round(value if abs(value) >= _MS_FROM else value * 1000)
    except (ValueError, OverflowError):
        pass
    raise UndatedError(f"its field {path} is no time: {str(value)[:100]!r}")


def _from_iso(text: str) -> int:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    # timestamp() is a float; its rounding would move whole milliseconds.
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // _MILLISECOND
