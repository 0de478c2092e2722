"""Segments read back from the archive, to be counted or judged again without a model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.arrow import SEGMENT_COLUMNS
from schemas.records import Segments

_POSITION = ("source", "partition", "offset")
_ROWS_AT_ONCE = 1024


def read_segments(
    files: Sequence[Path], directions: int
) -> Iterator[tuple[NDArray[np.int64], Segments]]:
    """All conversations of some files of table `conversations`, in parts.

    Yields:
      Numbers of conversations in the order of their positions over all files, and their segments.
    """
    numbers = _numbers(files)
    for file in files:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=list(SEGMENT_COLUMNS)):
                yield numbers[: len(batch)], segments_of(batch, directions)
                numbers = numbers[len(batch) :]


def segments_of(rows: pa.RecordBatch | pa.Table, directions: int) -> Segments:
    """The segments of rows of table `conversations`, made with so many directions."""
    found: dict[str, Any] = {name: _flat(rows[name]) for name in SEGMENT_COLUMNS}
    counts = np.diff(_offsets(rows["segment_role"]))
    row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    vectors = (found[name].reshape(len(row), directions) for name in SEGMENT_COLUMNS[3:])
    return Segments(len(counts), row, *(found[name] for name in SEGMENT_COLUMNS[:3]), *vectors)


def _numbers(files: Sequence[Path]) -> NDArray[np.int64]:
    """Rank of every row by its position, row after row, file after file."""
    keys = pa.concat_tables([pq.read_table(file, columns=list(_POSITION)) for file in files])
    order = keys.append_column("row", pa.array(np.arange(len(keys)))).sort_by(
        [(name, "ascending") for name in _POSITION]
    )
    ranks = np.empty(len(keys), np.int64)
    ranks[order["row"].to_numpy()] = np.arange(len(keys))
    return ranks


def _flat(column: pa.Array | pa.ChunkedArray) -> NDArray[np.generic]:
    return _whole(column).flatten().to_numpy()


def _offsets(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
    return _whole(column).offsets.to_numpy()


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.ListArray:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
