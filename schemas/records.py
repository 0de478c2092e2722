"""Records that travel through the pipeline, from a log entry to a verdict.

Cosines are quantised once, in the scorer, to int16 *steps* of 1/32767; everything after the
scorer (judging, ranges, archive) works on those integers. Where a conversation has no tokens of a
role, `ABSENT` stands for its values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS_PER_UNIT = 32767
"""Steps in a cosine of 1."""

ABSENT = -32768
"""Stands where a role has no tokens; no cosine quantises to it."""

SEGMENT_TOKENS = 64
"""Most tokens of a segment."""

Int8s = NDArray[np.int8]
Int16s = NDArray[np.int16]
Int32s = NDArray[np.int32]
UInt8s = NDArray[np.uint8]
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
class Segments:
    """Lowest and highest cosine per segment and direction, and where they stand.

    A segment is a run of at most SEGMENT_TOKENS tokens of one role. The segments of a conversation
    are together, in its order, and hold all of its tokens. S segments, D directions.

    Attributes:
      conversations: how many the segments are of; one may have none.
      row: which of them, int32 [S], ascending.
      role: values of `Role`, int8 [S].
      start: position of the first token in the conversation, uint32 [S].
      tokens: how many there are, uint8 [S].
      low: steps, int16 [S, D].
      high: likewise.
      low_at: tokens after `start` at which the lowest stands first, uint8 [S, D].
      high_at: likewise of the highest.
    """

    conversations: int
    row: Int32s
    role: Int8s
    start: UInt32s
    tokens: UInt8s
    low: Int16s
    high: Int16s
    low_at: UInt8s
    high_at: UInt8s

    @staticmethod
    def none(conversations: int, directions: int) -> "Segments":
        """Of conversations without tokens."""
        empty = np.empty(0, np.int32)
        steps, places = np.empty((0, directions), np.int16), np.empty((0, directions), np.uint8)
        return Segments(
            conversations,
            empty,
            empty.astype(np.int8),
            empty.astype(np.uint32),
            empty.astype(np.uint8),
            *(steps, steps, places, places),
        )

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> "Segments":
        """The segments of the given conversations, each once, in the given order."""
        wanted = np.asarray(rows, np.int64)
        begins = np.searchsorted(self.row, wanted)
        counts = np.searchsorted(self.row, wanted, side="right") - begins
        row = np.repeat(np.arange(len(wanted), dtype=np.int32), counts)
        ends = np.cumsum(counts)
        places = np.arange(len(row)) + np.repeat(begins - (ends - counts), counts)
        return Segments(len(wanted), row, *(part[places] for part in self._parts()))

    @staticmethod
    def joined(parts: Sequence["Segments"]) -> "Segments":
        """The conversations of one after those of the other."""
        befores = np.cumsum([0, *(part.conversations for part in parts)]).tolist()
        rows = [part.row + np.int32(n) for part, n in zip(parts, befores[:-1], strict=True)]
        columns = zip(*(part._parts() for part in parts), strict=True)
        joined = (np.concatenate(column) for column in columns)
        return Segments(befores[-1], np.concatenate(rows), *joined)

    def _parts(self) -> tuple[Any, ...]:
        """All arrays but `row`."""
        return (
            self.role,
            self.start,
            self.tokens,
            self.low,
            self.high,
            self.low_at,
            self.high_at,
        )


@dataclass(frozen=True, slots=True)
class ScoredPack:
    """Scored conversations of one model and epoch."""

    model: str
    epoch: int
    rows: tuple[ScoredRow, ...]
    segments: Segments  # of the rows, in their order


@dataclass(frozen=True, slots=True)
class Exceedance:
    """A series outside its range. `value` and `bound` are cosines in steps, not negated."""

    role: Role
    direction: int  # index in the directions artefact
    side: Side
    value: int
    bound: int
    margin: int  # how far outside, in steps, > 0
    token: int  # position in the conversation, from 0


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
    ranges_hash: str  # of the ranges judged against
    calibrated_on: tuple[int, int]  # conversations with a user, with an assistant, in those ranges


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
