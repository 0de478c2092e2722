"""Counts that leave the judge, to files in the slice's folder for the driver to commit."""

from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam

from schemas.artefacts import written
from transforms.archive import pending
from transforms.judge import Snapshot


@dataclass
class WriteSnapshots(beam.PTransform):
    """Snapshot to one file each, `closed-EPOCH` or `open-EPOCH`, in a folder per model.

    Attributes:
      folder: of the slice.
    """

    folder: Path

    def expand(self, snapshots: beam.PCollection[Snapshot]) -> beam.PCollection[str]:
        return snapshots | beam.Map(_write, self.folder)


def _write(snapshot: Snapshot, folder: Path) -> str:
    kind = "closed" if snapshot.closed else "open"
    path = pending.pending_path(folder, snapshot.model, kind, snapshot.epoch, pending.RANGES)
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(snapshot.counted.to_bytes())
    return str(path)
