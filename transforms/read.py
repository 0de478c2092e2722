"""A plan's part of the logs, as dated records in the order of the log."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.metrics import Metrics
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.window import TimestampedValue

from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.plan import PartitionSlice, Plan
from schemas.records import Header, LogRecord, Position
from transforms.logs.entries import Entry
from transforms.logs.open import open_logs
from transforms.logs.times import Dating, EventTime, clock_for


@dataclass
class ReadLog(beam.PTransform):
    """LogRecord for every entry of the plan, stamped with its effective time.

    Partitions follow each other in the plan's order and entries by offset, so that what is made
    of them in arrival order is the same in a re-run.

    Attributes:
      plan: which offsets.
      event_time: what dates a record.
      epoch_ms: length of an epoch.
      properties: how Kafka brokers are secured.
    """

    plan: Plan
    event_time: EventTime
    epoch_ms: int
    properties: ClientProperties = NOT_SECURED

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection[LogRecord]:
        parts = self.plan.partitions
        reader = _ReadPartition(self.event_time, self.epoch_ms, self.plan.clock_ms, self.properties)
        return (
            pipeline
            | beam.Impulse()  # Create would reshuffle
            | "Partitions" >> beam.FlatMap(lambda _: parts).with_output_types(PartitionSlice)
            | "Entries" >> beam.ParDo(reader)
        )


class _WholeTracker(OffsetRestrictionTracker):
    """Splits off only what is untouched as a whole: a partition's times need its order."""

    def try_split(self, fraction_of_remainder: float) -> Any:
        untouched = self._last_claim_attempt is None
        return super().try_split(0) if untouched and fraction_of_remainder == 0 else None


class _Offsets(RestrictionProvider):
    def initial_restriction(self, element: PartitionSlice) -> OffsetRange:
        return OffsetRange(element.start, element.end)

    def create_tracker(self, restriction: OffsetRange) -> _WholeTracker:
        return _WholeTracker(restriction)

    def restriction_size(self, element: PartitionSlice, restriction: OffsetRange) -> int:
        return int(restriction.size())


class _ReadPartition(beam.DoFn):
    def __init__(
        self, event_time: EventTime, epoch_ms: int, plan_ms: int, properties: ClientProperties
    ) -> None:
        self._event_time = event_time
        self._epoch_ms = epoch_ms
        self._plan_ms = plan_ms
        self._properties = properties
        self._seen = Metrics.counter("deltawatch", "seen")

    def process(
        self,
        part: PartitionSlice,
        tracker: Any = beam.DoFn.RestrictionParam(_Offsets()),  # noqa: B008 - Beam's way
    ) -> Iterator[Any]:  # Beam would take TimestampedValue for the element's type
        (log,) = open_logs(part.uri, self._properties)
        clock = clock_for(
            self._event_time, log.timestamped, self._epoch_ms, part.running_max, self._plan_ms
        )
        for entry in log.read(part.id.partition, part.start, part.end):
            if not tracker.try_claim(entry.offset):
                return
            self._seen.inc()
            yield _stamped(_record(part, entry, clock.date(entry)))
        tracker.try_claim(part.end)  # the last offsets may hold nothing


def _record(part: PartitionSlice, entry: Entry, dating: Dating) -> LogRecord:
    header = Header(
        Position(part.id.source, part.id.partition, entry.offset),
        dating.event_time,
        dating.effective_time,
        dating.epoch or 0,
        dating.late,
    )
    return LogRecord(header, entry.value, dating.error)


def _stamped(record: LogRecord) -> TimestampedValue:
    return TimestampedValue(record, (record.header.effective_time or 0) / 1000)
