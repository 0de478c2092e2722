"""Verdicts made again from the archive's rows, and compared with what stands there, bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from schemas.arrow import ROLE_SINCE, schema_version
from schemas.records import Header, Judgement, Position, ScoredPack, ScoredRow, VerdictPack
from transforms.archive.fitted import Basis
from transforms.archive.rows import conversations_table, exceedances_table
from transforms.archive.segments import segments_of
from transforms.ranges.policies import Judgements

_OF_CONVERSATION = ("status", "role", "score", "threshold", "low", "high")
_OF_EXCEEDANCE = (
    *("conversation_id", "epoch", "effective_time"),
    *("direction", "layer", "kind", "rank_index", "role", "side"),
    *("value", "bound", "margin", "token_start", "token_end"),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that stands otherwise in the archive than it was recomputed; None: it is not there.

    Attributes:
      what: a column, or a place in one.
      archived: what the archive says; cosines are float32.
      recomputed: what comes out.
    """

    what: str
    archived: Any
    recomputed: Any


def judge(conversations: pa.Table, basis: Basis) -> Judgements:
    """Judge rows of table `conversations` anew, from their segments alone."""
    return basis.fitted.judge(segments_of(conversations, len(basis.directions)))


def differences(
    conversation: pa.Table, exceedances: pa.Table, judgement: Judgement, basis: Basis
) -> list[Difference]:
    """Where the archive says something else about a conversation than a judgement does.

    Args:
      conversation: its row of table `conversations`, with the file's footer.
      exceedances: its rows of table `exceedances`, largest margin first.
      judgement: made of the row by `judge`.
      basis: by which it was made.
    """
    pack = _pack(conversation, judgement, basis)
    (archived,) = conversation.to_pylist()
    (recomputed,) = conversations_table([pack], basis.directions, "").to_pylist()
    if archived["role"] is None and schema_version(conversation.schema) < ROLE_SINCE:
        recomputed["role"] = None
    mine = exceedances.to_pylist()
    theirs = exceedances_table([pack], basis.directions, "").to_pylist()
    found = list(_differing(archived, recomputed, _OF_CONVERSATION))
    for number, (one, other) in enumerate(zip_longest(mine, theirs), start=1):
        of = f"of exceedance {number}"
        if one is None or other is None:
            return [*found, Difference("number of exceedances", len(mine), len(theirs))]
        found += _differing(one, other, _OF_EXCEEDANCE, f" {of}")
    return found


def _pack(conversation: pa.Table, judgement: Judgement, basis: Basis) -> VerdictPack:
    (row,) = conversation.to_pylist()
    position = Position(row["source"], row["partition"], row["offset"])
    time = conversation["effective_time"].cast(pa.int64())[0].as_py()
    header = Header(position, None, time, row["epoch"], row["late"])
    scored = ScoredRow(header, row["conversation_id"], row["tokens"], row["truncated"])
    segments = segments_of(conversation, len(basis.directions))
    return VerdictPack(
        ScoredPack("", row["epoch"], (scored,), segments),
        (judgement,),
        row["policy"],
        row["ranges_hash"],
        basis.conversations,
    )


def _differing(
    archived: Mapping[str, Any], recomputed: Mapping[str, Any], names: Sequence[str], of: str = ""
) -> Iterator[Difference]:
    for name in names:
        one, other = archived[name], recomputed[name]
        if one == other:
            continue
        if isinstance(one, list):  # the first place says enough
            place = next(i for i in range(len(one)) if one[i] != other[i])
            yield Difference(f"{name}[{place}]{of}", one[place], other[place])
        else:
            yield Difference(f"{name}{of}", one, other)
