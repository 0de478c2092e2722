"""Flagged conversations read back from the archive, by what a person names."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from schemas.arrow import CONVERSATIONS, SEGMENT_COLUMNS
from schemas.ids import alert_id
from schemas.records import Position, Segments, Status
from transforms.archive.segments import segments_of

_IDENTITY = ("source", "partition", "offset", "directions_hash", "policy", "conversation_id")
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Choice:
    """Which flagged conversations are meant.

    Attributes:
      ids: of their alerts, or their own; none: any.
      since: earliest effective time, milliseconds since 1970 UTC; None: any.
      until: the first that is too late; None: any.
    """

    ids: frozenset[str] = frozenset()
    since: int | None = None
    until: int | None = None

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return not self.ids and self.since is None and self.until is None


def read_flagged(
    archive: Path, model: str, directions_hash: str, directions: int, choice: Choice
) -> Segments:
    """Segments of the chosen conversations of a model that were flagged.

    Args:
      archive: root of the tables.
      model: its name.
      directions_hash: of its directions; what was scored with others is passed over.
      directions: how many there are.
      choice: which are meant.
    """
    found = [Segments.none(0, directions)]
    for rows in _rows(archive, model, directions_hash, choice):
        meant = [_is_meant(row, choice.ids) for row in rows.select(list(_IDENTITY)).to_pylist()]
        found.append(segments_of(rows.filter(pa.array(meant, pa.bool_())), directions))
    return Segments.joined(found)


def _rows(
    archive: Path, model: str, directions_hash: str, choice: Choice
) -> Iterator[pa.RecordBatch]:
    folder = archive / CONVERSATIONS / f"model={quote(model, safe='')}"
    if not folder.is_dir():
        return
    wanted = (pc.field("status") == Status.FLAGGED.value) & (
        pc.field("directions_hash") == directions_hash
    )
    for moment, compare in ((choice.since, pc.greater_equal), (choice.until, pc.less)):
        if moment is not None:
            time = pa.scalar(moment, pa.timestamp("ms", tz="UTC"))
            wanted &= compare(pc.field("effective_time"), time)
    rows = ds.dataset(folder, format="parquet")
    columns = [*_IDENTITY, *SEGMENT_COLUMNS]
    yield from rows.to_batches(columns=columns, filter=wanted, batch_size=_ROWS_AT_ONCE)


def _is_meant(row: dict[str, Any], ids: frozenset[str]) -> bool:
    if not ids or row["conversation_id"] in ids:
        return True
    position = Position(row["source"], row["partition"], row["offset"])
    return alert_id(position, row["directions_hash"], row["policy"]) in ids
