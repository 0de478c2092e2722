"""Rows of an archive found by what an alert says, without reading the rest of it.

Everything here raises OSError or pa.ArrowException where a file cannot be read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from schemas.arrow import (
    CONVERSATIONS,
    EXCEEDANCES,
    RANGES,
    conversations_schema,
    exceedances_schema,
    ranges_schema,
)
from schemas.ids import alert_id
from schemas.records import Position, Status
from transforms.ranges.series import PER_DIRECTION

_POSITION = ("source", "partition", "offset")
_KEYS = (*_POSITION, "conversation_id", "status", "policy", "directions_hash")
_FILE = "__filename"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a conversation stands in an archive.

    Attributes:
      file: of table `conversations`.
      position: of its record in the log.
      conversation_id: its own.
      alert: id of the alert about it; None: there was none.
    """

    file: Path
    position: Position
    conversation_id: str
    alert: str | None

    @property
    def model(self) -> str:
        """The name of the model that the conversation was with."""
        return unquote(self._model.name.partition("=")[2])

    @property
    def _model(self) -> Path:
        return self.file.parents[1]

    @property
    def _is_mine(self) -> ds.Expression:
        columns = zip(_POSITION, astuple(self.position), strict=True)
        return reduce(and_, (ds.field(name) == value for name, value in columns))

    def conversation(self) -> pa.Table:
        """Its row of table `conversations`, with the file's footer."""
        schema = pq.read_schema(self.file)
        directions = schema.field("low").type.list_size // 2
        found = _read([self.file], conversations_schema(directions), self._is_mine)
        return found.replace_schema_metadata(schema.metadata)

    def exceedances(self) -> pa.Table:
        """Its rows of table `exceedances`, largest margin first."""
        file = self._in(EXCEEDANCES) / self.file.parent.name / self.file.name
        return _read([file] if file.exists() else [], exceedances_schema(), self._is_mine)

    def ranges(self, conversation: pa.Table) -> list[pa.Table]:
        """What table `ranges` says that its conversation may have been judged by.

        Args:
          conversation: its row.

        Returns:
          Rows of all series, in their order, of the newest epoch before that has any; several
          times where the policy's settings had been changed. Rows by a former version, which do not
          name the policy, where there are no others.
        """
        ranges_hash, policy, epoch = (
            conversation[name][0].as_py() for name in ("ranges_hash", "policy", "epoch")
        )
        series = PER_DIRECTION * (conversation.schema.field("low").type.list_size // 2)
        fits = (ds.field("ranges_hash") == ranges_hash) & (ds.field("epoch") < epoch)
        fits &= (ds.field("policy") == policy) | ds.field("policy").is_null()
        days = sorted(self._in(RANGES).glob("date=*"), key=lambda day: day.name, reverse=True)
        for day in days:
            if day.name <= self.file.parent.name:
                rows = _read(sorted(day.glob("*.parquet")), ranges_schema(), fits)
                if len(rows):
                    return _newest(rows, series)
        return []

    def _in(self, table: str) -> Path:
        """The model's folder of another table."""
        return self._model.parents[1] / table / self._model.name


def find(archive: Path, named: str) -> list[Place]:
    """Conversations that have an id of their own, or else an alert whose id begins like it."""
    folders = sorted((archive / CONVERSATIONS).glob("model=*"))
    places = [place for folder in folders for place in _places(folder, named)]
    own = [place for place in places if place.conversation_id == named]
    return own or [place for place in places if (place.alert or "").startswith(named)]


def _places(model: Path, named: str) -> Iterator[Place]:
    """Conversations with an alert, or with an id of their own that is asked for."""
    keys = pa.schema([conversations_schema(1).field(name) for name in _KEYS])
    asked = (ds.field("status") == str(Status.FLAGGED)) | (ds.field("conversation_id") == named)
    found = ds.dataset(model, keys, "parquet").scanner([*_KEYS, _FILE], asked)
    for row in (row for batch in found.to_batches() for row in batch.to_pylist()):
        position = Position(*(row[name] for name in _POSITION))
        flagged = row["status"] == Status.FLAGGED
        alert = alert_id(position, row["directions_hash"], row["policy"]) if flagged else None
        yield Place(Path(row[_FILE]), position, row["conversation_id"], alert)


def _read(files: Sequence[Path], schema: pa.Schema, wanted: ds.Expression) -> pa.Table:
    """Rows of files in their order; null where a former version had no such column."""
    found = ds.dataset([str(file) for file in files], schema, "parquet").scanner(filter=wanted)
    return found.to_table().combine_chunks()


def _newest(rows: pa.Table, series: int) -> list[pa.Table]:
    """The rows of the latest epoch, once for every time that all series are there."""
    newest = rows.filter(pc.equal(rows["epoch"], pc.max(rows["epoch"])))
    named = newest.filter(pc.is_valid(newest["policy"]))
    newest = named if len(named) else newest
    whole = range(0, len(newest) - series + 1, series)
    return [newest.slice(start, series) for start in whole]
