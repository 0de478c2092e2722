"""Log records to conversations; what holds none leaves with a reason."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput

from schemas.reasons import Reason, SkipReason
from schemas.records import Conversation, DeadLetter, Decoded, LogRecord, Skipped
from transforms import formats

DEAD = "dead_letters"
SKIPPED = "skipped"


@dataclass(frozen=True)
class Routes:
    """Which model judges a conversation.

    Attributes:
      by_name: what the model field of a record may say, to the name of the model that is meant.
      otherwise: judges every other conversation; None: nobody does.
    """

    by_name: Mapping[str, str]
    otherwise: str | None

    def model_of(self, conversation: Conversation) -> str:
        """The model's name. Raises DecodeError(UNKNOWN_MODEL)."""
        named = conversation.model
        model = self.otherwise if named is None else self.by_name.get(named, self.otherwise)
        if model is None:
            what = "names no model" if named is None else f"names model {ascii(named)[:80]}"
            raise formats.DecodeError(Reason.UNKNOWN_MODEL, f"the record {what}")
        return model


@dataclass
class Decode(beam.PTransform):
    """LogRecord to Decoded, DeadLetter or Skipped: exactly one output for every record.

    Outputs: `conversations` (main), `dead_letters`, `skipped`.

    Attributes:
      routes: which model judges a conversation.
    """

    routes: Routes

    def expand(self, records: beam.PCollection[LogRecord]) -> Any:
        decode = beam.FlatMap(_decoded, self.routes)
        return records | decode.with_outputs(DEAD, SKIPPED, main="conversations")


def _decoded(record: LogRecord, routes: Routes) -> Iterator[Any]:
    if skipped := _skipped(record):
        yield TaggedOutput(SKIPPED, skipped)
        return
    try:
        conversation = _conversation(record)
        yield Decoded(record, conversation, routes.model_of(conversation))
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
