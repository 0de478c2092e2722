"""Log records to token ids with a role each; what cannot be decoded leaves with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput

from schemas.reasons import Reason, SkipReason
from schemas.records import Conversation, DeadLetter, LogRecord, Skipped, Tokenized
from transforms import formats
from transforms.model import roles
from transforms.model.engine import Engine

DEAD = "dead_letters"
SKIPPED = "skipped"


@dataclass
class Decode(beam.PTransform):
    """LogRecord to Tokenized, DeadLetter or Skipped: exactly one output for every record.

    Outputs: `tokenized` (main), `dead_letters`, `skipped`.

    Attributes:
      engine: whose tokenizer and chat template are used.
      max_tokens: conversations are cut there and marked `truncated`; None: never.
    """

    engine: Engine
    max_tokens: int | None

    def expand(self, records: beam.PCollection[LogRecord]) -> Any:
        return records | beam.ParDo(_DecodeRecord(self.engine, self.max_tokens)).with_outputs(
            DEAD, SKIPPED, main="tokenized"
        )


class _DecodeRecord(beam.DoFn):
    def __init__(self, engine: Engine, max_tokens: int | None) -> None:
        self._engine = engine
        self._max_tokens = max_tokens

    def setup(self) -> None:
        self._tokenizer = self._engine.tokenizer()

    def process(self, record: LogRecord) -> Iterator[Any]:
        if skipped := _skipped(record):
            yield TaggedOutput(SKIPPED, skipped)
            return
        try:
            yield self._tokenized(record)
        except formats.DecodeError as error:
            yield _dead(record, error.reason, error.detail)
        except roles.TemplateError as error:
            yield _dead(record, Reason.TEMPLATE_ERROR, str(error))

    def _tokenized(self, record: LogRecord) -> Tokenized:
        conversation = formats.parse(record.value or b"")
        # Only now: what is no conversation has no field with a time either.
        if record.time_error is not None:
            raise formats.DecodeError(Reason.BAD_TIME, record.time_error)
        token_ids, token_roles, truncated = roles.tokenize(
            self._tokenizer, conversation.messages, self._max_tokens
        )
        return Tokenized(
            record.header, _name(record, conversation), token_ids, token_roles, truncated
        )


def _skipped(record: LogRecord) -> Skipped | None:
    if record.value is None:
        return Skipped(record.header, SkipReason.TOMBSTONE)
    if not record.value.strip():
        return Skipped(record.header, SkipReason.BLANK)
    return None


def _name(record: LogRecord, conversation: Conversation) -> str:
    if conversation.conversation_id is not None:
        return conversation.conversation_id
    position = record.header.position
    return f"{position.source}/{position.partition}/{position.offset}"


def _dead(record: LogRecord, reason: Reason, detail: str) -> TaggedOutput:
    return TaggedOutput(DEAD, DeadLetter(record.header, reason, detail, record.value))
