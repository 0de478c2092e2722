"""Verdicts to Parquet files, one per table and epoch, that wait for their epoch to close."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import FixedWindows

from schemas.arrow import CONVERSATIONS, EXCEEDANCES
from schemas.artefacts import written
from schemas.records import Status, VerdictPack
from transforms.archive import files, pending, rows
from transforms.model.directions import Directions
from transforms.model.excerpts import Excerpts

OF_MODEL = "deltawatch/"
"""With a model's name behind it: the namespace of what is counted of that model alone."""


@dataclass
class WriteTables(beam.PTransform):
    """VerdictPack to the rows of `conversations` and `exceedances`; yields the files' paths.

    Attributes:
      folder: of the slice.
      epoch_ms: length of an epoch, by which verdicts are windowed.
      directions: per model the names of its directions.
      excerpts: per model what makes the text shown with a peak; of others no text leaves.
    """

    folder: Path
    epoch_ms: int
    directions: Mapping[str, Directions]
    excerpts: Mapping[str, Excerpts]

    def expand(self, verdicts: beam.PCollection[VerdictPack]) -> beam.PCollection[str]:
        return (
            verdicts
            | "Epochs" >> beam.WindowInto(FixedWindows(self.epoch_ms / 1000))
            | "KeyByModel" >> beam.Map(_by_model).with_output_types(tuple[str, VerdictPack])
            | "OneFile" >> beam.GroupByKey()
            | "Write" >> beam.ParDo(_WriteEpoch(self.folder, self.directions, self.excerpts))
        )


class _WriteEpoch(beam.DoFn):
    def __init__(
        self,
        folder: Path,
        directions: Mapping[str, Directions],
        excerpts: Mapping[str, Excerpts],
    ) -> None:
        self._folder = folder
        self._named = {name: (each.entries, each.hash) for name, each in directions.items()}
        self._excerpts = excerpts

    def process(self, keyed: tuple[str, Iterable[VerdictPack]]) -> Iterator[str]:
        model, packs = keyed[0], list(keyed[1])
        epoch = packs[0].scored.epoch
        named, excerpts = self._named[model], self._excerpts.get(model)
        conversations = rows.conversations_table(packs, *named)
        exceedances = rows.exceedances_table(packs, *named, excerpts)
        for name, table in ((CONVERSATIONS, conversations), (EXCEEDANCES, exceedances)):
            path = pending.pending_path(self._folder, model, name, epoch, pending.TABLES)
            with written(path):
                files.write_table(table, path)
            yield str(path)
        _count(model, conversations.num_rows, packs)


def _by_model(pack: VerdictPack) -> tuple[str, VerdictPack]:
    return pack.scored.model, pack


def _count(model: str, written: int, packs: list[VerdictPack]) -> None:
    statuses = Counter(judgement.status for pack in packs for judgement in pack.judgements)
    for namespace in ("deltawatch", OF_MODEL + model):
        Metrics.counter(namespace, "scored").inc(written)
        Metrics.counter(namespace, "flagged").inc(statuses[Status.FLAGGED])
        Metrics.counter(namespace, "uncalibrated").inc(statuses[Status.UNCALIBRATED])
