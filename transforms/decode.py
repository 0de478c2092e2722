"""Log records to conversations; what holds none leaves with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput

from schemas.reasons import Reason, SkipReason
from schemas.records import Conversation, DeadLetter, Decoded, LogRecord, Skipped
from transforms import formats

DEAD = "dead_letters"
SKIPPED = "skipped"


@dataclass
class Decode(beam.PTransform):
    """LogRecord to Decoded, DeadLetter or Skipped: exactly one output for every record.

    Outputs: `conversations` (main), `dead_letters`, `skipped`.
    """

    def expand(self, records: beam.PCollection[LogRecord]) -> Any:
        return records | beam.FlatMap(_decoded).with_outputs(DEAD, SKIPPED, main="conversations")


def _decoded(record: LogRecord) -> Iterator[Any]:
    if skipped := _skipped(record):
        yield TaggedOutput(SKIPPED, skipped)
        return
    try:
        yield Decoded(record, _conversation(record))
    except formats.DecodeError as error:
        letter = DeadLetter(record.header, error.reason, error.detail, record.value)
        yield TaggedOutput(DEAD, letter)


def _conversation(record: LogRecord) -> Conversation:
    conversation = formats.parse(record.value or b"")
    # Only now: what is no conversation has no field with a time either.
    if record.time_error is not None:
        raise formats.DecodeError(Reason.BAD_TIME, record.time_error)
    return conversation


def _skipped(record: LogRecord) -> Skipped | None:
    if record.value is None:
        return Skipped(record.header, SkipReason.TOMBSTONE)
    if not record.value.strip():
        return Skipped(record.header, SkipReason.BLANK)
    return None
