"""Verdicts to Parquet files, one per table and epoch, that wait for their epoch to close."""

from collections import Counter
from collections.abc import Iterable, Iterator
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


@dataclass
class WriteTables(beam.PTransform):
    """VerdictPack to the rows of `conversations` and `exceedances`; yields the files' paths.

    Attributes:
      folder: of the slice.
      epoch_ms: length of an epoch, by which verdicts are windowed.
      directions: names of the directions.
      excerpts: makes the text shown with a peak; None: no text leaves.
    """

    folder: Path
    epoch_ms: int
    directions: Directions
    excerpts: Excerpts | None

    def expand(self, verdicts: beam.PCollection[VerdictPack]) -> beam.PCollection[str]:
        return (
            verdicts
            | "Epochs" >> beam.WindowInto(FixedWindows(self.epoch_ms / 1000))
            | "KeyByModel" >> beam.Map(_by_model).with_output_types(tuple[str, VerdictPack])
            | "OneFile" >> beam.GroupByKey()
            | "Write" >> beam.ParDo(_WriteEpoch(self.folder, self.directions, self.excerpts))
        )


class _WriteEpoch(beam.DoFn):
    def __init__(self, folder: Path, directions: Directions, excerpts: Excerpts | None) -> None:
        self._folder = folder
        self._entries = directions.entries
        self._hash = directions.hash
        self._excerpts = excerpts

    def process(self, keyed: tuple[str, Iterable[VerdictPack]]) -> Iterator[str]:
        model, packs = keyed[0], list(keyed[1])
        epoch = packs[0].scored.epoch
        conversations = rows.conversations_table(packs, self._entries, self._hash)
        exceedances = rows.exceedances_table(packs, self._entries, self._hash, self._excerpts)
        for name, table in ((CONVERSATIONS, conversations), (EXCEEDANCES, exceedances)):
            path = pending.pending_path(self._folder, model, name, epoch, pending.TABLES)
            with written(path):
                files.write_table(table, path)
            yield str(path)
        _count(conversations.num_rows, packs)


def _by_model(pack: VerdictPack) -> tuple[str, VerdictPack]:
    return pack.scored.model, pack


def _count(written: int, packs: list[VerdictPack]) -> None:
    statuses = Counter(judgement.status for pack in packs for judgement in pack.judgements)
    Metrics.counter("deltawatch", "scored").inc(written)
    Metrics.counter("deltawatch", "flagged").inc(statuses[Status.FLAGGED])
    Metrics.counter("deltawatch", "uncalibrated").inc(statuses[Status.UNCALIBRATED])
