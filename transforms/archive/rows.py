"""Verdicts and ranges as Arrow tables, ready to be written (schemas.arrow says what columns mean).

Rows are in the order of their positions (source, partition, offset), whatever the order of the
packs, so that the same slice always makes the same file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.arrow import (
    QUANTILES,
    SEGMENT_COLUMNS,
    conversations_schema,
    exceedances_schema,
    ranges_schema,
    with_footer,
)
from schemas.evidence import Direction, Evidence, ExcerptOf, evidence_of
from schemas.records import (
    ABSENT,
    STEPS_PER_UNIT,
    Judgement,
    Position,
    Role,
    ScoredRow,
    Segments,
    Side,
    VerdictPack,
)
from schemas.text import well_formed
from transforms.ranges.series import Stretches

Row = tuple[ScoredRow, Judgement, VerdictPack]


def conversations_table(
    packs: Sequence[VerdictPack], directions: Sequence[Direction], directions_hash: str
) -> pa.Table:
    """Table `conversations` of judged packs of one directions artefact (D directions).

    Args:
      packs: judged packs.
      directions: the artefact's entries in stored order.
      directions_hash: of that artefact.
    """
    rows = [row for pack in packs for row in _rows(pack)]
    positions = [row.header.position for row, _, _ in rows]
    order = np.array(sorted(range(len(rows)), key=positions.__getitem__), np.int64)
    columns = _row_columns([rows[i] for i in order])
    columns["directions_hash"] = [directions_hash] * len(rows)
    none = Segments.none(0, len(directions))
    segments = Segments.joined([none, *(pack.scored.segments for pack in packs)]).take(order)
    columns |= _conversation_vectors(segments) | _segment_columns(segments)
    return _table(columns, conversations_schema(len(directions)), directions, directions_hash)


def exceedances_table(
    packs: Sequence[VerdictPack],
    directions: Sequence[Direction],
    directions_hash: str,
    excerpt_of: ExcerptOf | None = None,
) -> pa.Table:
    """Table `exceedances` of judged packs; of one conversation the largest margin comes first.

    Args:
      packs: judged packs of one directions artefact.
      directions: the artefact's entries in stored order.
      directions_hash: of that artefact.
      excerpt_of: makes excerpts of rows that kept their token ids; None makes none.
    """
    found = [
        (row, evidence)
        for pack in packs
        for index, row in enumerate(pack.scored.rows)
        for evidence in evidence_of(pack, index, directions, excerpt_of)
    ]
    found.sort(key=lambda pair: pair[0].header.position)  # stable: margins stay in order
    rows, evidences = [row for row, _ in found], [evidence for _, evidence in found]
    columns = {**_header_columns(rows), **_evidence_columns(evidences)}
    return _table(columns, exceedances_schema(), directions, directions_hash)


def ranges_table(
    epoch: int,
    epoch_start: int | None,
    ranges_hash: str,
    counts: NDArray[np.integer[Any]],
    extremes: NDArray[np.number[Any]],
    quantiles: Mapping[str, NDArray[np.number[Any]]],
    fitted: Mapping[str, Any],
    directions: Sequence[Direction],
    directions_hash: str,
) -> pa.Table:
    """Table `ranges` of one closed epoch: 4 * D rows.

    Args:
      epoch: the closed epoch.
      epoch_start: milliseconds since 1970 UTC; None for a log without times.
      ranges_hash: of the ranges after closing.
      counts: conversations per series [4 * D]: high of role user's directions, high of
        assistant's, then low of user's and low of assistant's, both stored negated.
      extremes: largest value per series [4 * D], in steps; ignored where the count is 0.
      quantiles: per name in `schemas.arrow.QUANTILES` values [4 * D], in steps.
      fitted: what `transforms.archive.fitted.columns` makes of the policy fitted to the ranges.
      directions: the artefact's entries in stored order (D).
      directions_hash: of that artefact.
    """
    series = 4 * len(directions)
    signs = np.repeat([1, -1], series // 2)
    empty = np.asarray(counts) == 0
    columns: dict[str, Any] = {
        "epoch": [epoch] * series,
        "effective_time": [epoch_start] * series,
        "ranges_hash": [ranges_hash] * series,
        **_series_columns(directions),
        "n": counts,
        "extreme": cosines(signs * extremes, empty),
        **fitted,
    }
    for name in QUANTILES:
        columns[name] = cosines(signs * quantiles[name], empty)
    return _table(columns, ranges_schema(), directions, directions_hash)


def _rows(pack: VerdictPack) -> list[Row]:
    return [(*pair, pack) for pair in zip(pack.scored.rows, pack.judgements, strict=True)]


def _row_columns(rows: Sequence[Row]) -> dict[str, Any]:
    scored, judgements = (
        [row for row, _, _ in rows],
        [judgement for _, judgement, _ in rows],
    )
    return {
        **_header_columns(scored),
        "event_time": [row.header.event_time for row in scored],
        "late": [row.header.late for row in scored],
        "tokens": [row.tokens for row in scored],
        "truncated": [row.truncated for row in scored],
        "status": [judgement.status.value for judgement in judgements],
        "score": [_cosine(judgement.score) for judgement in judgements],
        "threshold": [_cosine(judgement.threshold) for judgement in judgements],
        "policy": [pack.policy for _, _, pack in rows],
        "ranges_hash": [pack.ranges_hash for _, _, pack in rows],
        "role": [None if each.role is None else each.role.name.lower() for each in judgements],
    }


def _header_columns(rows: Sequence[ScoredRow]) -> dict[str, Any]:
    positions: list[Position] = [row.header.position for row in rows]
    return {
        "conversation_id": [well_formed(row.conversation_id) for row in rows],
        "source": [well_formed(position.source) for position in positions],
        "partition": [position.partition for position in positions],
        "offset": [position.offset for position in positions],
        "effective_time": [row.header.effective_time for row in rows],
        "epoch": [row.header.epoch for row in rows],
    }


def _direction_columns(directions: Sequence[Direction]) -> dict[str, Any]:
    return {
        "direction": [direction.name for direction in directions],
        "layer": [direction.layer for direction in directions],
        "kind": [direction.kind for direction in directions],
        "rank_index": [direction.index for direction in directions],
    }


def _evidence_columns(evidences: Sequence[Evidence]) -> dict[str, Any]:
    exceedances = [evidence.exceedance for evidence in evidences]
    tokens = np.array([exceedance.token for exceedance in exceedances], np.int64)
    return {
        **_direction_columns([evidence.direction for evidence in evidences]),
        "role": [exceedance.role.name.lower() for exceedance in exceedances],
        "side": [exceedance.side.value for exceedance in exceedances],
        "value": cosines(np.array([exceedance.value for exceedance in exceedances])),
        "bound": cosines(np.array([exceedance.bound for exceedance in exceedances])),
        "margin": cosines(np.array([exceedance.margin for exceedance in exceedances])),
        "token_start": tokens,
        "token_end": tokens + 1,
        "excerpt": [evidence.excerpt for evidence in evidences],
    }


def _series_columns(directions: Sequence[Direction]) -> dict[str, Any]:
    count = len(directions)
    roles = [role.name.lower() for role in Role for _ in range(count)]
    columns = {name: values * 4 for name, values in _direction_columns(directions).items()}
    sides = [side.value for side in (Side.HIGH, Side.LOW) for _ in range(2 * count)]
    return {**columns, "role": roles * 2, "side": sides}


def _cosine(steps: int | None) -> float | None:
    return None if steps is None else steps / STEPS_PER_UNIT


def cosines(steps: NDArray[np.number[Any]], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Steps as float32, null where they are missing; `round(value * 32767)` gives them back."""
    values = (np.asarray(steps, np.float64) / STEPS_PER_UNIT).astype(np.float32)
    return pa.array(values, pa.float32(), mask=missing)


def _conversation_vectors(segments: Segments) -> dict[str, pa.Array]:
    """`low` and `high` of whole conversations, fixed-size lists [2 * D]."""
    directions = segments.low.shape[1]
    whole = Stretches.of(segments).whole()
    shape = (segments.conversations, len(Role), directions)
    low, high = np.full(shape, ABSENT, np.int16), np.full(shape, ABSENT, np.int16)
    high[whole.row, whole.role] = whole.values[:, :directions]
    low[whole.row, whole.role] = -whole.values[:, directions:]
    schema = conversations_schema(directions)
    return {
        name: pa.FixedSizeListArray.from_arrays(
            pa.array(values.ravel()), type=schema.field(name).type
        )
        for name, values in (("low", low), ("high", high))
    }


def _segment_columns(segments: Segments) -> dict[str, pa.Array]:
    """Lists with a place, or D places, for every segment of a conversation."""
    begins = np.searchsorted(segments.row, np.arange(segments.conversations + 1))
    schema = conversations_schema(segments.low.shape[1])
    columns = {}
    for name in SEGMENT_COLUMNS:
        values = getattr(segments, name.removeprefix("segment_"))
        offsets = begins * values[:1].size if len(values) else begins
        columns[name] = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(values.ravel()), type=schema.field(name).type
        )
    return columns


def _table(
    columns: Mapping[str, Any],
    schema: pa.Schema,
    directions: Sequence[Direction],
    directions_hash: str,
) -> pa.Table:
    schema = with_footer(schema, directions_hash, [direction.name for direction in directions])
    return pa.Table.from_pydict(dict(columns), schema)
