"""Conversations to batches for the model, tokenised while the model works on those before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    Batches are formed over the bundle, which on FnApiRunner is the whole slice, model after model,
    from groups in order of (characters, arrival); arrival order is that of the log, so a re-run
    forms the same batches. A batch is of one model.

    Attributes:
      engines: by the models' names; whose tokenizers and chat templates are used.
      max_tokens: conversations are cut there and marked `truncated`; None: never.
      batch_tokens: most tokens in a batch, padding included; a longer conversation is a batch of
        its own.
    """

    engines: Mapping[str, Engine]
    max_tokens: int | None
    batch_tokens: int

    def expand(self, conversations: beam.PCollection[Decoded]) -> Any:
        tokenize = _TokenizeAhead(self.engines, self.max_tokens, self.batch_tokens)
        return conversations | beam.ParDo(tokenize).with_outputs(DEAD, main="batches")


class _TokenizeAhead(beam.DoFn):
    def __init__(
        self, engines: Mapping[str, Engine], max_tokens: int | None, batch_tokens: int
    ) -> None:
        self._engines = engines
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens

    def setup(self) -> None:
        engines = self._engines.items()
        self._tokenizers = {name: engine.tokenizer() for name, engine in engines}
        self._vocabularies = {name: engine.vocabulary for name, engine in engines}

    def start_bundle(self) -> None:
        self._waiting: list[Decoded] = []

    def process(self, decoded: Decoded) -> None:
        self._waiting.append(decoded)

    def finish_bundle(self) -> Iterator[Any]:
        for outcomes in _ahead(partial(self._tokenized, *group) for group in self._groups()):
            yield from map(_windowed, self._outputs(outcomes))

    def _groups(self) -> Iterator[tuple[str, list[Decoded]]]:
        for model in self._engines:
            ordered = sorted((d for d in self._waiting if d.model == model), key=_characters)
            for start in range(0, len(ordered), GROUP):
                yield model, ordered[start : start + GROUP]

    def _tokenized(self, model: str, group: Sequence[Decoded]) -> list[_Outcome]:
        messages = [each.conversation.messages for each in group]
        known = self._tokenizers[model], messages, self._max_tokens, self._vocabularies[model]
        made = roles.tokenize(*known)
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
    return Tokenized(record.header, decoded.model, _name(record, decoded.conversation), *made)


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
