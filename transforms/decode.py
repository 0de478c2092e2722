"""Log records to token ids with a role each; what cannot be decoded leaves with a reason."""

from collections.abc import Iterator, Sequence
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

RECORDS_AT_ONCE = 64
"""Are tokenised side by side, on all cores."""


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
        decode = _DecodeRecords(self.engine, self.max_tokens)
        return (
            records
            | "Together" >> beam.BatchElements(RECORDS_AT_ONCE, RECORDS_AT_ONCE)
            | "Each" >> beam.ParDo(decode).with_outputs(DEAD, SKIPPED, main="tokenized")
        )


class _DecodeRecords(beam.DoFn):
    def __init__(self, engine: Engine, max_tokens: int | None) -> None:
        self._engine = engine
        self._max_tokens = max_tokens

    def setup(self) -> None:
        self._tokenizer = self._engine.tokenizer()

    def process(self, records: Sequence[LogRecord]) -> Iterator[Any]:
        found: list[tuple[LogRecord, Conversation]] = []
        for record in records:
            parsed = _parsed(record)
            if isinstance(parsed, Conversation):
                found.append((record, parsed))
            else:
                yield parsed
        messages = [conversation.messages for _, conversation in found]
        tokens = roles.tokenize(self._tokenizer, messages, self._max_tokens)
        for (record, conversation), made in zip(found, tokens, strict=True):
            if isinstance(made, roles.TemplateError):
                yield _dead(record, Reason.TEMPLATE_ERROR, str(made))
            else:
                yield Tokenized(record.header, _name(record, conversation), *made)


def _parsed(record: LogRecord) -> Conversation | TaggedOutput:
    """The conversation in a record, or what becomes of the record instead."""
    if skipped := _skipped(record):
        return TaggedOutput(SKIPPED, skipped)
    try:
        conversation = formats.parse(record.value or b"")
    except formats.DecodeError as error:
        return _dead(record, error.reason, error.detail)
    # Only now: what is no conversation has no field with a time either.
    if record.time_error is not None:
        return _dead(record, Reason.BAD_TIME, record.time_error)
    return conversation


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
