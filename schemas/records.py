"""Records that travel through the pipeline, from a log entry to a verdict.

Cosines are quantised once, in the scorer, to int16 *steps* of 1/32767; everything after the
scorer (judging, ranges, archive) works on those integers. A role without tokens has `ABSENT`
in all its places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

STEPS_PER_UNIT = 32767
"""Steps in a cosine of 1."""

ABSENT = -32768
"""Stands where a role has no tokens; no cosine quantises to it."""

Int16s = NDArray[np.int16]
Int32s = NDArray[np.int32]
UInt32s = NDArray[np.uint32]


class Role(IntEnum):
    """Whose tokens a value is about; also its place in every per-role array."""

    USER = 0  # with system, developer and tool messages, and what the template adds by itself
    ASSISTANT = 1


class Side(StrEnum):
    """Which end of a direction's values."""

    HIGH = "high"
    LOW = "low"


class Status(StrEnum):
    """The three answers about a scored conversation; "not scored" is a dead letter."""

    CLEAN = "clean"
    FLAGGED = "flagged"
    UNCALIBRATED = "uncalibrated"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where a record stands in its log; never changes, so ids are made from it."""

    source: str  # "kafka://CLUSTER_ID/TOPIC" or "file://NAME?sha256=FIRST_16_HEX"
    partition: int  # 0 for a file
    offset: int  # Kafka's offset, or the byte at which the line starts (decompressed)


@dataclass(frozen=True, slots=True)
class Header:
    """Position and times of a record.

    Times are milliseconds since 1970 UTC; None: the log has none.
    """

    position: Position
    event_time: int | None
    effective_time: int | None  # max(event time, running maximum of the partition)
    epoch: int  # effective_time // epoch length; 0 without times
    late: bool  # the record's own epoch is earlier than that of its effective time


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One entry of a log, as read."""

    header: Header
    value: bytes | None  # None: a Kafka tombstone
    time_error: str | None = None  # why the record could not be dated (dead letter `bad_time`)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: user, assistant, system or tool.
      content: its text.
      unfinished: whether the model was stopped before it said that its turn is over.
    """

    role: str
    content: str
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a log format makes of a record: messages, its own id and its model's name, if any."""

    conversation_id: str | None
    messages: tuple[Message, ...]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A record that holds a conversation, and the name of the model that judges it."""

    record: LogRecord
    conversation: Conversation
    model: str


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A conversation ready for the model."""

    header: Header
    model: str
    conversation_id: str
    token_ids: Int32s  # [tokens]
    roles: NDArray[np.int8]  # [tokens], values of Role
    truncated: bool  # cut at --max-tokens

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """What a scored conversation is besides its cosines."""

    header: Header
    conversation_id: str
    tokens: int
    truncated: bool
    token_ids: Int32s | None = None  # kept only where excerpts are asked for


@dataclass(frozen=True, slots=True)
class Cosines:
    """Lowest and highest cosine per conversation, role and direction, and where they stand.

    All arrays are [conversations, 2 * directions]: role USER's directions, then ASSISTANT's.
    """

    low: Int16s
    high: Int16s
    low_at: UInt32s  # token positions; 0 where the role is absent
    high_at: UInt32s

    def take(self, rows: list[int]) -> "Cosines":
        """The given rows, in the given order."""
        return Cosines(self.low[rows], self.high[rows], self.low_at[rows], self.high_at[rows])

    @staticmethod
    def joined(parts: Sequence["Cosines"]) -> "Cosines":
        """The rows of one after those of the other."""
        columns = zip(*((p.low, p.high, p.low_at, p.high_at) for p in parts), strict=True)
        return Cosines(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True, slots=True)
class ScoredPack:
    """Scored conversations of one model and epoch."""

    model: str
    epoch: int
    rows: tuple[ScoredRow, ...]
    cosines: Cosines


@dataclass(frozen=True, slots=True)
class Exceedance:
    """A series outside its range. `value` and `bound` are cosines in steps, not negated."""

    role: Role
    direction: int  # index in the directions artefact
    side: Side
    value: int
    bound: int
    margin: int  # how far outside, in steps, > 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """A policy's answer about one conversation. Scores are in steps."""

    status: Status
    role: Role | None  # the role that decided; None where nothing could be scored
    score: int | None
    threshold: int | None  # None: that role is not calibrated
    exceedances: tuple[Exceedance, ...]  # of flagged conversations, largest margin first


@dataclass(frozen=True, slots=True)
class VerdictPack:
    """A scored pack with what the policy said of every row."""

    scored: ScoredPack
    judgements: tuple[Judgement, ...]  # one per row
    policy: str  # "name/version"
    ranges_hash: str  # of the ranges judged against; "" where there were none yet


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be scored, and why (`schemas.reasons.Reason`)."""

    header: Header
    reason: str
    detail: str
    original: bytes | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that holds no conversation by nature (tombstone, blank line)."""

    header: Header
    reason: str
