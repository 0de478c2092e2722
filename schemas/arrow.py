"""Arrow schemas of the archive's three tables.

Columns are added, never taken out or changed; version 2 is the one exception.

Cosines that were steps (int16) are kept as steps in `conversations` and as float32 elsewhere:
`round(value * 32767)` gives the steps back exactly. The model and the date are in the folders'
names (hive partitions), not in the files. Times are milliseconds UTC, null where the log has
none.
"""

import json
from collections.abc import Sequence

import pyarrow as pa

from schemas.version import TOOL_VERSION

SCHEMA_VERSION = 3
"""Counts up with every added column. 1 had positions of whole conversations, and no segments; 2 did
not say what ranges become by a policy, nor which role decided."""

CONVERSATIONS = "conversations"
EXCEEDANCES = "exceedances"
RANGES = "ranges"

QUANTILES = ("p50", "p90", "p99", "p999")
"""Columns of `ranges`: quantiles of the per-conversation extremes."""

ROLE_SINCE = 3
"""The first version with column `role` of `conversations`."""

SCHEMA_VERSION_KEY = "deltawatch.schema_version"
"""Footer key."""

DIRECTIONS_HASH = "deltawatch.directions_hash"
"""Footer key: files with different values were made with different directions."""

_TIME = pa.timestamp("ms", tz="UTC")


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SEGMENT_COLUMNS = (
    "segment_role",
    "segment_start",
    "segment_tokens",
    "segment_low",
    "segment_high",
    "segment_low_at",
    "segment_high_at",
)
"""Columns of `conversations` with a list over its segments; see `schemas.records.Segments`."""


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_required("element", kind))


def _vector(kind: pa.DataType, length: int) -> pa.DataType:
    return pa.list_(_required("element", kind), length)


_POSITION = [
    _required("conversation_id", pa.string()),
    _required("source", pa.string()),
    _required("partition", pa.int32()),
    _required("offset", pa.int64()),
]
_DIRECTION = [
    _required("direction", pa.string()),
    _required("layer", pa.int32()),
    _required("kind", pa.string()),
    _required("rank_index", pa.int32()),
    _required("role", pa.string()),
    _required("side", pa.string()),
]


def conversations_schema(directions: int) -> pa.Schema:
    """One row per scored conversation.

    Args:
      directions: D; `low` and `high` have 2 * D places, role user's directions in the artefact's
        order and then assistant's, in steps of 1/32767 (-32768: the role has no tokens). They are
        the extremes of the segments, which stand in lists of their own: a place each in
        `segment_role` (0 user, 1 assistant), `segment_start` and `segment_tokens`, D places each,
        one segment after the other, in the rest (`..._at`: tokens after the segment's start).
        `role` is the one that decided, `score` and `threshold` are its, in cosine units; null
        where nothing could be scored, or where that role is not calibrated.
    """
    steps = _vector(pa.int16(), 2 * directions)
    return pa.schema(
        [
            *_POSITION,
            pa.field("event_time", _TIME),
            pa.field("effective_time", _TIME),
            _required("late", pa.bool_()),
            _required("epoch", pa.int64()),
            _required("tokens", pa.int32()),
            _required("truncated", pa.bool_()),
            _required("status", pa.string()),
            pa.field("score", pa.float32()),
            pa.field("threshold", pa.float32()),
            _required("policy", pa.string()),
            _required("ranges_hash", pa.string()),
            _required("directions_hash", pa.string()),
            _required("low", steps),
            _required("high", steps),
            _required("segment_role", _list(pa.int8())),
            _required("segment_start", _list(pa.uint32())),
            _required("segment_tokens", _list(pa.uint8())),
            _required("segment_low", _list(pa.int16())),
            _required("segment_high", _list(pa.int16())),
            _required("segment_low_at", _list(pa.uint8())),
            _required("segment_high_at", _list(pa.uint8())),
            pa.field("role", pa.string()),
        ]
    )


def exceedances_schema() -> pa.Schema:
    """One row per flagged conversation, role, direction and side outside its range.

    `value`, `bound` and `margin` are cosines; the extreme stands at token `token_start`
    (`token_end` is the position after it); `excerpt` is null unless asked for.
    """
    return pa.schema(
        [
            *_POSITION,
            pa.field("effective_time", _TIME),
            _required("epoch", pa.int64()),
            *_DIRECTION,
            _required("value", pa.float32()),
            _required("bound", pa.float32()),
            _required("margin", pa.float32()),
            _required("token_start", pa.int64()),
            _required("token_end", pa.int64()),
            pa.field("excerpt", pa.string()),
        ]
    )


def ranges_schema() -> pa.Schema:
    """One row per closed epoch and series (role, direction, side), as judged against next.

    What the first epoch is judged against has rows as of the one before it; what an epoch is judged
    against after another policy has come, under `policy` and `settings`, has rows of both.

    `effective_time` is the epoch's start, `n` the conversations counted, `extreme` the most
    extreme cosine on that side and `p50`... the quantiles towards it (of the low side: the value
    that fraction of the conversations stay above); null where n is 0.

    The rest is the policy fitted to the ranges, in cosine units: with it every verdict can be made
    again (see `transforms.archive.fitted`). `bound` is the series' (null where n is 0). The others
    are the role's: `known`, whether it is scored; `threshold`, null where it is not calibrated;
    `handicap`, taken off its score for every doubling of its segments; `window`, how far above the
    threshold a score still counts as it is.
    """
    return pa.schema(
        [
            _required("epoch", pa.int64()),
            pa.field("effective_time", _TIME),
            _required("ranges_hash", pa.string()),
            *_DIRECTION,
            _required("n", pa.int64()),
            pa.field("extreme", pa.float32()),
            *(pa.field(name, pa.float32()) for name in QUANTILES),
            pa.field("policy", pa.string()),
            pa.field("settings", pa.string()),
            pa.field("bound", pa.float32()),
            pa.field("known", pa.bool_()),
            pa.field("threshold", pa.float32()),
            pa.field("handicap", pa.float32()),
            pa.field("window", pa.float32()),
        ]
    )


def schema_version(schema: pa.Schema) -> int:
    """Which version of the tables a file is of, by its footer; 0: it does not say."""
    return int((schema.metadata or {}).get(SCHEMA_VERSION_KEY.encode(), 0))


def with_footer(schema: pa.Schema, directions_hash: str, names: Sequence[str]) -> pa.Schema:
    """`schema` with what the file's footer shall say.

    Args:
      schema: of a table.
      directions_hash: of the directions artefact the rows were made with.
      names: the directions' names in stored order, so that the vectors can be read without it.
    """
    return schema.with_metadata(
        {
            SCHEMA_VERSION_KEY: str(SCHEMA_VERSION),
            "deltawatch.tool_version": TOOL_VERSION,
            DIRECTIONS_HASH: directions_hash,
            "deltawatch.directions": json.dumps(list(names)),
        }
    )
