"""Batches of token ids to the lowest and highest cosine per segment and direction."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from schemas.reasons import Reason
from schemas.records import DeadLetter, ScoredPack, ScoredRow, Segments, Tokenized
from transforms.model.engine import Engine, ScoresBatches
from transforms.model.memory import Part, score_what_fits

UNSCORED = "unscored"
PACK_ROWS = 256
"""From so many on a pack goes on; judging and writing have a price per pack."""

Outcome = ScoredPack | DeadLetter


class Scorers(dict[str, ScoresBatches]):
    """By the models' names. Beam refers to it weakly, which a plain dict does not allow."""


@dataclass
class Score(beam.PTransform):
    """Batches of Tokenized to ScoredPack, an epoch each; DeadLetter for what has no score.

    Outputs: `scored` (main), `unscored`.

    Attributes:
      engines: the models, by name.
      keep_tokens: carry token ids on, for excerpts.
    """

    engines: Mapping[str, Engine]
    keep_tokens: bool = False

    def expand(self, batches: beam.PCollection[list[Tokenized]]) -> Any:
        handler = ScoringHandler(self.engines, self.keep_tokens)
        return (
            batches
            | "Infer" >> RunInference(handler.with_no_batching())
            | "Pack" >> beam.ParDo(_Pack()).with_outputs(UNSCORED, main="scored")
        )


class ScoringHandler(ModelHandler[Tokenized, Outcome, Scorers]):
    """RunInference's view of the engines."""

    def __init__(self, engines: Mapping[str, Engine], keep_tokens: bool) -> None:
        super().__init__()
        self._engines = engines
        self._keep_tokens = keep_tokens
        self._tokens = Metrics.counter("deltawatch", "tokens")
        self._microseconds = Metrics.counter("deltawatch", "scoring_us")

    def load_model(self) -> Scorers:
        """The process's one scorer of each model."""
        return Scorers((name, engine.scorer()) for name, engine in self._engines.items())

    def run_inference(
        self,
        batch: Sequence[Tokenized],
        model: Scorers,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[Outcome]:
        """Score one batch, already sorted and bounded, all of one model."""
        started = time.perf_counter_ns()
        rows = [(item.token_ids, item.roles) for item in batch]
        parts = list(score_what_fits(model[batch[0].model], rows))
        self._microseconds.inc((time.perf_counter_ns() - started) // 1000)
        self._tokens.inc(self.get_num_tokens(batch))
        return [outcome for part in parts for outcome in self._outcomes(batch, part)]

    def get_num_bytes(self, batch: Sequence[Tokenized]) -> int:
        """Bytes of token ids; the default would pickle every batch to count them."""
        return 4 * self.get_num_tokens(batch)

    @staticmethod
    def get_num_tokens(batch: Sequence[Tokenized]) -> int:
        """Tokens in a batch, without padding."""
        return sum(map(len, batch))

    def _outcomes(self, batch: Sequence[Tokenized], part: Part) -> Iterator[Outcome]:
        members = batch[part.rows.start : part.rows.stop]
        if part.scores is None:
            yield from map(_does_not_fit, members)
            return
        segments, finite = part.scores
        yield from self._packs(members, segments, np.flatnonzero(finite).tolist())
        yield from (_not_finite(members[row]) for row in np.flatnonzero(~finite).tolist())

    def _packs(
        self, batch: Sequence[Tokenized], segments: Segments, rows: Iterable[int]
    ) -> Iterator[ScoredPack]:
        by_epoch = sorted(rows, key=lambda row: batch[row].header.epoch)
        for epoch, members in groupby(by_epoch, key=lambda row: batch[row].header.epoch):
            chosen = list(members)
            scored_rows = tuple(self._row(batch[row]) for row in chosen)
            yield ScoredPack(batch[0].model, epoch, scored_rows, segments.take(chosen))

    def _row(self, item: Tokenized) -> ScoredRow:
        kept = item.token_ids if self._keep_tokens else None
        return ScoredRow(item.header, item.conversation_id, len(item), item.truncated, kept)


def _not_finite(item: Tokenized) -> DeadLetter:
    detail = f"NaN or Inf in the activations of {len(item)} tokens"
    return DeadLetter(item.header, Reason.NOT_FINITE, detail, None)


def _does_not_fit(item: Tokenized) -> DeadLetter:
    detail = f"{len(item)} tokens do not fit into memory at once"
    return DeadLetter(item.header, Reason.OUT_OF_MEMORY, detail, None)


class _Pack(beam.DoFn):
    """Joins what a bundle's batches of a model say of an epoch; sends dead letters elsewhere."""

    def start_bundle(self) -> None:
        self._waiting: dict[tuple[str, int], list[ScoredPack]] = {}

    def process(self, outcome: Outcome) -> Iterator[Any]:
        if isinstance(outcome, DeadLetter):
            yield TaggedOutput(UNSCORED, outcome)
            return
        key = (outcome.model, outcome.epoch)
        packs = self._waiting.setdefault(key, [])
        packs.append(outcome)
        if sum(len(pack.rows) for pack in packs) >= PACK_ROWS:
            yield _joined(self._waiting.pop(key))

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for packs in self._waiting.values():
            yield GlobalWindows.windowed_value_at_end_of_window(_joined(packs))


def _joined(packs: Sequence[ScoredPack]) -> ScoredPack:
    rows = tuple(row for pack in packs for row in pack.rows)
    segments = Segments.joined([pack.segments for pack in packs])
    return ScoredPack(packs[0].model, packs[0].epoch, rows, segments)
