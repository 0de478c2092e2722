"""The plan of a slice: which records it reads, fixed before they are read.

Offsets are Kafka's, or bytes for files (`schemas.records.Position`). Times are milliseconds
since 1970 UTC.
"""

from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 2
"""1 did not name itself and had no `gaps`."""


@dataclass(frozen=True, slots=True, order=True)
class PartitionId:
    """A partition of a log; a file is a log of one partition."""

    source: str  # as in `Position`
    partition: int


@dataclass(frozen=True, slots=True)
class PartitionProgress:
    """How far a partition has been read."""

    id: PartitionId
    uri: str  # where it can be read
    offset: int  # next to be read
    running_max: int | None  # of record times before `offset`; None: no dated record yet
    last_new_ms: int  # by the plans' clocks, when it last had something to read; 0: never

    @staticmethod
    def from_json(document: dict[str, Any]) -> "PartitionProgress":
        """Read back what `dataclasses.asdict` gave."""
        return PartitionProgress(**{**document, "id": PartitionId(**document["id"])})


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets [start, end) that the log deleted before they were read."""

    id: PartitionId
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PartitionSlice:
    """A partition's part of a slice: offsets [start, end)."""

    id: PartitionId
    uri: str
    start: int
    end: int
    running_max: int | None  # of record times before `start`
    cuts: tuple[tuple[int, int], ...]  # (epoch, offset of its first record), ascending


@dataclass(frozen=True, slots=True)
class Plan:
    """One slice. With the configuration it determines every verdict of the slice.

    Attributes:
      number: of the slice, from 1.
      clock_ms: when it was planned; times too far after it are not believed.
      config_hash: of the configuration it was planned under.
      closed_epoch: newest closed epoch before the slice; None: none yet.
      complete_through: epochs up to this one have no records beyond the slice; None: none.
      partitions: what is read, in the order in which it is read.
      records: how many entries that is.
      after: progress of every partition once the slice is committed.
      idle: partitions that were silent, and took over the others' maximum time.
      gaps: what the logs deleted, e.g. by retention, since the slice before.
    """

    number: int
    clock_ms: int
    config_hash: str
    closed_epoch: int | None
    complete_through: int | None
    partitions: tuple[PartitionSlice, ...]
    records: int
    after: tuple[PartitionProgress, ...]
    idle: tuple[PartitionId, ...]
    gaps: tuple[Gap, ...] = ()

    @property
    def lost(self) -> int:
        """Offsets that are gone unread."""
        return sum(gap.end - gap.start for gap in self.gaps)

    @property
    def closed_before(self) -> int | None:
        """The closed epoch, or at the very beginning the one before the first; None: no epoch."""
        if self.closed_epoch is not None:
            return self.closed_epoch
        firsts = [part.cuts[0][0] for part in self.partitions if part.cuts]
        return min(firsts) - 1 if firsts else None

    @property
    def closed_after(self) -> int | None:
        """The closed epoch once the slice is committed."""
        return self.closed_before if self.complete_through is None else self.complete_through

    @property
    def ends_an_epoch(self) -> bool:
        """Whether it closes one and reads nothing beyond."""
        read = [epoch for part in self.partitions for epoch, _ in part.cuts]
        return self.complete_through is not None and all(map(self.closes, read))

    def closes(self, epoch: int) -> bool:
        """Whether an epoch is closed once the slice is committed."""
        return self.closed_after is not None and epoch <= self.closed_after

    def to_json(self) -> dict[str, Any]:
        """As the plan file holds it."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Plan":
        """Read back what `to_json` wrote, now or in an older version.

        Raises ValueError for a format this version does not know.
        """
        fields = {"gaps": (), **document}
        if fields.pop("format", 1) not in range(1, FORMAT + 1):
            raise ValueError(f"plan format {document['format']}, newer than {FORMAT}")
        parts = [
            PartitionSlice(
                **{
                    **part,
                    "id": PartitionId(**part["id"]),
                    "cuts": tuple((epoch, offset) for epoch, offset in part["cuts"]),
                }
            )
            for part in document["partitions"]
        ]
        after = tuple(map(PartitionProgress.from_json, document["after"]))
        idle = tuple(PartitionId(**each) for each in document["idle"])
        gaps = tuple(Gap(**{**gap, "id": PartitionId(**gap["id"])}) for gap in fields["gaps"])
        read = {"partitions": tuple(parts), "after": after, "idle": idle, "gaps": gaps}
        return Plan(**{**fields, **read})
