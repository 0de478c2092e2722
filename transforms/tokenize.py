"""Conversations to batches for the model, tokenised while the model works on those before."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from schemas.reasons import Reason
from schemas.records import Conversation, DeadLetter, Decoded, LogRecord, Tokenized
from transforms.model import roles
from transforms.model.batching import batches
from transforms.model.engine import Engine

DEAD = "dead_letters"
MAX_BATCH_ROWS = 512
GROUP = 256
"""Conversations that are tokenised together, while the model has those of the group before."""

_T = TypeVar("_T")
_Outcome = Tokenized | DeadLetter


@dataclass
class Tokenize(beam.PTransform):
    """Decoded to lists of Tokenized, a batch each; DeadLetter where the template refuses.

    Outputs: `batches` (main), `dead_letters`.

    Batches are formed over the bundle, which on FnApiRunner is the whole slice, from groups in
    order of (characters, arrival); arrival order is that of the log, so a re-run forms the same
    batches.

    Attributes:
      engine: whose tokenizer and chat template are used.
      max_tokens: conversations are cut there and marked `truncated`; None: never.
      batch_tokens: most tokens in a batch, padding included; a longer conversation is a batch of
        its own.
    """

    engine: Engine
    max_tokens: int | None
    batch_tokens: int

    def expand(self, conversations: beam.PCollection[Decoded]) -> Any:
        tokenize = _TokenizeAhead(self.engine, self.max_tokens, self.batch_tokens)
        return conversations | beam.ParDo(tokenize).with_outputs(DEAD, main="batches")


class _TokenizeAhead(beam.DoFn):
    def __init__(self, engine: Engine, max_tokens: int | None, batch_tokens: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens

    def setup(self) -> None:
        self._tokenizer = self._engine.tokenizer()

    def start_bundle(self) -> None:
        self._waiting: list[Decoded] = []

    def process(self, decoded: Decoded) -> None:
        self._waiting.append(decoded)

    def finish_bundle(self) -> Iterator[Any]:
        ordered = sorted(self._waiting, key=_characters)
        groups = (ordered[start : start + GROUP] for start in range(0, len(ordered), GROUP))
        for outcomes in _ahead(partial(self._tokenized, group) for group in groups):
            yield from map(_windowed, self._outputs(outcomes))

    def _tokenized(self, group: Sequence[Decoded]) -> list[_Outcome]:
        messages = [each.conversation.messages for each in group]
        made = roles.tokenize(self._tokenizer, messages, self._max_tokens)
        return [_outcome(*pair) for pair in zip(group, made, strict=True)]

    def _outputs(self, outcomes: Sequence[_Outcome]) -> Iterator[Any]:
        yield from (TaggedOutput(DEAD, each) for each in outcomes if isinstance(each, DeadLetter))
        items = [each for each in outcomes if isinstance(each, Tokenized)]
        for batch in batches([len(item) for item in items], self._batch_tokens, MAX_BATCH_ROWS):
            yield [items[index] for index in batch]


def _ahead(steps: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """What the steps give; each is taken in a thread while what the one before gave is used."""
    with ThreadPoolExecutor(1) as thread:
        begun: Future[_T] | None = None
        for step in steps:
            following = thread.submit(step)
            if begun is not None:
                yield begun.result()
            begun = following
        if begun is not None:
            yield begun.result()


def _outcome(decoded: Decoded, made: roles.Tokens | roles.TemplateError) -> _Outcome:
    record = decoded.record
    if isinstance(made, roles.TemplateError):
        return DeadLetter(record.header, Reason.TEMPLATE_ERROR, str(made), record.value)
    return Tokenized(record.header, _name(record, decoded.conversation), *made)


def _name(record: LogRecord, conversation: Conversation) -> str:
    if conversation.conversation_id is not None:
        return conversation.conversation_id
    position = record.header.position
    return f"{position.source}/{position.partition}/{position.offset}"


def _characters(decoded: Decoded) -> int:
    return sum(len(message.content) for message in decoded.conversation.messages)


def _windowed(output: Any) -> Any:
    if isinstance(output, TaggedOutput):
        return TaggedOutput(output.tag, _windowed(output.value))
    return GlobalWindows.windowed_value_at_end_of_window(output)
