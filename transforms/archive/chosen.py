"""Conversations read back from the archive, by what a person names."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from schemas.arrow import CONVERSATIONS, SEGMENT_COLUMNS, conversations_schema
from schemas.ids import alert_id
from schemas.records import Position, Segments, Status
from transforms.archive.segments import segments_of

SHORTEST = 8
"""Characters of an alert's id that name it."""

_ROWS_AT_ONCE = 1024

_IDENTITY = ("source", "partition", "offset", "policy", "conversation_id")
_ASKED = ("status", "directions_hash", "effective_time")


@dataclass(frozen=True)
class Choice:
    """Which conversations are meant.

    Attributes:
      ids: of their alerts, or the beginnings of these, or their own, flagged or not; none: any that
        were flagged.
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

    def named_by(self, alert: str, conversation: str) -> set[str]:
        """Those of the ids that mean a conversation."""
        beginnings = {each for each in self.ids if len(each) >= SHORTEST}
        named = {each for each in beginnings if alert.startswith(each)}
        return named | (self.ids & {conversation})


@dataclass
class Found:
    """Conversations, each once.

    Attributes:
      segments: of the conversations.
      ids: that named any of them.
      positions: of their records.
    """

    segments: Segments
    ids: set[str] = field(default_factory=set)
    positions: set[Position] = field(default_factory=set)

    def add(self, rows: pa.RecordBatch, directions_hash: str, choice: Choice) -> None:
        """Add those of some rows that are meant and not there yet."""
        identities = rows.select(list(_IDENTITY)).to_pylist()
        chosen = [self._is_new(row, directions_hash, choice) for row in identities]
        places = np.flatnonzero(chosen)
        directions = self.segments.low.shape[1]
        self.segments = Segments.joined([self.segments, segments_of(rows, directions).take(places)])

    def _is_new(self, row: dict[str, Any], directions_hash: str, choice: Choice) -> bool:
        position = Position(row["source"], row["partition"], row["offset"])
        alert = alert_id(position, directions_hash, row["policy"])
        named = choice.named_by(alert, row["conversation_id"])
        if choice.ids and not named:
            return False
        self.ids |= named  # judged twice, by another policy, it has another alert
        is_new = position not in self.positions
        self.positions.add(position)
        return is_new


def read_chosen(
    archive: Path, model: str, directions_hash: str, directions: int, choice: Choice
) -> Found:
    """The chosen conversations of a model.

    Args:
      archive: root of the tables.
      model: its name.
      directions_hash: of its directions; what was scored with others is passed over, and so is what
        a version before segments archived.
      directions: how many there are.
      choice: which are meant.

    Raises:
      OSError, pa.ArrowException: a file cannot be read.
    """
    found = Found(Segments.none(0, directions))
    for rows in _rows(archive, model, directions_hash, choice):
        found.add(rows, directions_hash, choice)
    return found


def read_others(
    archive: Path, model: str, directions_hash: str, directions: int, chosen: Found
) -> Iterator[Segments]:
    """All flagged conversations of a model but the chosen, each once, in parts.

    Arguments, and what is raised, as `read_chosen`.
    """
    others = Found(Segments.none(0, directions), positions=set(chosen.positions))
    for rows in _rows(archive, model, directions_hash, Choice()):
        others.segments = Segments.none(0, directions)
        others.add(rows, directions_hash, Choice())
        yield others.segments


def _rows(
    archive: Path, model: str, directions_hash: str, choice: Choice
) -> Iterator[pa.RecordBatch]:
    folder = archive / CONVERSATIONS / f"model={quote(model, safe='')}"
    if not folder.is_dir():
        return
    named = pc.field("conversation_id").isin(pa.array(sorted(choice.ids), pa.string()))
    wanted = (pc.field("status") == Status.FLAGGED.value) | named
    wanted &= pc.field("segment_role").is_valid()
    wanted &= pc.field("directions_hash") == directions_hash
    for moment, compare in ((choice.since, pc.greater_equal), (choice.until, pc.less)):
        if moment is not None:
            time = pa.scalar(moment, pa.timestamp("ms", tz="UTC"))
            wanted &= compare(pc.field("effective_time"), time)
    # Vectors of fixed length, which differ with the directions, are not read.
    names = (*_IDENTITY, *_ASKED, *SEGMENT_COLUMNS)
    schema = pa.schema([conversations_schema(1).field(name).with_nullable(True) for name in names])
    columns = [*_IDENTITY, *SEGMENT_COLUMNS]
    dataset = ds.dataset(folder, schema, "parquet")
    yield from dataset.to_batches(columns=columns, filter=wanted, batch_size=_ROWS_AT_ONCE)
