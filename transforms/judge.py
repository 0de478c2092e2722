"""Scored packs to verdicts: every epoch judged against ranges of closed epochs only.

Keyed by model. The epoch after the closed one is judged as it arrives; later epochs wait in a
ring of bags until a watermark timer has closed the ones before them. State decides which epoch
is closed next, never the time at which a timer fires.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import Coder, PickleCoder
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import TimestampedValue

from schemas.errors import RunFailedError
from schemas.records import ScoredPack
from transforms.ranges.judging import Judge
from transforms.ranges.policies import Policy
from transforms.ranges.ranges import Ranges, close

SNAPSHOTS = "snapshots"
RING = 8
"""Epochs a slice may span; the planner keeps to it."""


@dataclass(frozen=True)
class JudgeStart:
    """Where judging begins: what the last commit left.

    Attributes:
      closed_epoch: the newest epoch that is in `ranges`.
      ranges: per model the file of its ranges of closed epochs.
      open_counts: per model the file of what is counted so far in the epoch after it.
      complete_through: epochs up to this one have no records beyond this run; None: none.
      frozen: models whose ranges stay as they are, whatever is counted.
    """

    closed_epoch: int
    ranges: Mapping[str, Path]
    open_counts: Mapping[str, Path]
    complete_through: int | None
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counts of an epoch as they leave the judge: whole, or so far of one that is open."""

    model: str
    epoch: int
    closed: bool
    counted: Ranges


class Meta(NamedTuple):
    """The judge's bearings for one model."""

    closed_epoch: int
    armed_epoch: int | None  # the epoch at whose end the timer is set


@dataclass
class JudgeEpochs(beam.PTransform):
    """ScoredPack to VerdictPack, and a Snapshot of every epoch closed and the one left open.

    Outputs: `verdicts` (main), `snapshots`; both stamped with the start of their epoch.

    Attributes:
      policy: decides about a conversation, given ranges.
      start: where judging begins.
      epoch_ms: length of an epoch.
    """

    policy: Policy
    start: JudgeStart
    epoch_ms: int

    def expand(self, scored: beam.PCollection[ScoredPack]) -> Any:
        return (
            scored
            | "KeyByModel" >> beam.Map(_by_model).with_output_types(tuple[str, ScoredPack])
            | "Epochs"
            >> beam.ParDo(_EpochsOfModel(self.policy, self.start, self.epoch_ms)).with_outputs(
                SNAPSHOTS, main="verdicts"
            )
        )


class _RangesCoder(Coder):
    """Ranges as state: encoded once a bundle, when the state is committed."""

    def encode(self, value: Ranges) -> bytes:
        return value.to_bytes()

    def decode(self, encoded: bytes) -> Ranges:
        return Ranges.from_bytes(encoded)

    def is_deterministic(self) -> bool:
        return True


_EPOCH_END = TimerSpec("epoch_end", TimeDomain.WATERMARK)
_TIMER = beam.DoFn.TimerParam(_EPOCH_END)
_META = beam.DoFn.StateParam(ReadModifyWriteStateSpec("meta", PickleCoder()))
_CLOSED = beam.DoFn.StateParam(ReadModifyWriteStateSpec("closed", _RangesCoder()))
_OPEN = beam.DoFn.StateParam(ReadModifyWriteStateSpec("open", _RangesCoder()))
# Beam finds state cells by the defaults of named parameters, so the ring is spelt out.
_P = [beam.DoFn.StateParam(BagStateSpec(f"pending_{slot}", PickleCoder())) for slot in range(RING)]


class _Keeper:
    """One model's state, read through to what the run started with."""

    def __init__(
        self,
        model: str,
        start: JudgeStart,
        load: Callable[[Path], Ranges],
        states: tuple[Any, ...],
        ring: tuple[Any, ...],
    ) -> None:
        self._model = model
        self._start = start
        self._load = load
        self._meta, self._closed, self._open = states
        self._ring = ring

    @property
    def meta(self) -> Meta:
        return self._meta.read() or Meta(self._start.closed_epoch, None)

    @meta.setter
    def meta(self, value: Meta) -> None:
        self._meta.write(value)

    @property
    def closed(self) -> Ranges:
        return self._closed.read() or self._load(self._start.ranges[self._model])

    @property
    def open(self) -> Ranges:
        return self._open.read() or self._load(self._start.open_counts[self._model])

    @open.setter
    def open(self, value: Ranges) -> None:
        self._open.write(value)

    def pend(self, pack: ScoredPack) -> None:
        self._ring[pack.epoch % RING].add(pack)

    def close(self) -> Ranges:
        """Merge the open epoch into the closed ranges and begin the next one; what was counted."""
        counted = self.open
        if self._model not in self._start.frozen:
            self._closed.write(close(self.closed, counted))
        self._open.write(counted.emptied())
        return counted

    def take_pending(self, epoch: int) -> list[ScoredPack]:
        bag = self._ring[epoch % RING]
        packs = list(bag.read())  # reading is lazy: before clear
        bag.clear()
        return sorted(packs, key=lambda pack: pack.rows[0].header.position)


class _EpochsOfModel(beam.DoFn):
    def __init__(self, policy: Policy, start: JudgeStart, epoch_ms: int) -> None:
        self._policy = policy
        self._start = start
        self._epoch_ms = epoch_ms

    def setup(self) -> None:
        self._judges: dict[str, Judge] = defaultdict(partial(Judge, self._policy))
        # A file's name holds the hash of its content: it never changes.
        self._load = cache(_load)

    def process(
        self,
        keyed: tuple[str, ScoredPack],
        meta: Any = _META,
        closed: Any = _CLOSED,
        opened: Any = _OPEN,
        p0: Any = _P[0],
        p1: Any = _P[1],
        p2: Any = _P[2],
        p3: Any = _P[3],
        p4: Any = _P[4],
        p5: Any = _P[5],
        p6: Any = _P[6],
        p7: Any = _P[7],
        timer: Any = _TIMER,
    ) -> Iterator[Any]:
        model, pack = keyed
        ring = (p0, p1, p2, p3, p4, p5, p6, p7)
        keeper = _Keeper(model, self._start, self._load, (meta, closed, opened), ring)
        self._arm(keeper, timer)
        ahead = pack.epoch - keeper.meta.closed_epoch
        if ahead == 1:
            yield from self._verdicts(keeper, [pack])
        elif 1 < ahead <= RING:
            keeper.pend(pack)
        else:
            raise RunFailedError(
                f"a record of epoch {pack.epoch} came when {keeper.meta.closed_epoch} was closed: "
                f"the plan and the log disagree"
            )

    @on_timer(_EPOCH_END)
    def epoch_end(
        self,
        key: Any = beam.DoFn.KeyParam,
        meta: Any = _META,
        closed: Any = _CLOSED,
        opened: Any = _OPEN,
        p0: Any = _P[0],
        p1: Any = _P[1],
        p2: Any = _P[2],
        p3: Any = _P[3],
        p4: Any = _P[4],
        p5: Any = _P[5],
        p6: Any = _P[6],
        p7: Any = _P[7],
        timer: Any = _TIMER,
    ) -> Iterator[Any]:
        ring = (p0, p1, p2, p3, p4, p5, p6, p7)
        keeper = _Keeper(key, self._start, self._load, (meta, closed, opened), ring)
        epoch = keeper.meta.closed_epoch + 1
        complete = self._start.complete_through
        if complete is None or epoch > complete:
            yield self._snapshot(key, epoch, False, keeper.open)
            return
        yield self._snapshot(key, epoch, True, keeper.close())
        keeper.meta = Meta(epoch, None)
        self._arm(keeper, timer)
        yield from self._verdicts(keeper, keeper.take_pending(epoch + 1))

    def _arm(self, keeper: _Keeper, timer: Any) -> None:
        meta = keeper.meta
        if meta.armed_epoch is None:
            ending = meta.closed_epoch + 1
            timer.set((ending + 1) * self._epoch_ms / 1000)
            keeper.meta = Meta(meta.closed_epoch, ending)

    def _verdicts(self, keeper: _Keeper, packs: list[ScoredPack]) -> Iterator[TimestampedValue]:
        for pack in packs:
            judge = self._judges[pack.model]
            verdicts, keeper.open = judge.judge(pack, keeper.closed, keeper.open)
            yield TimestampedValue(verdicts, self._seconds(pack.epoch))

    def _snapshot(self, model: str, epoch: int, closed: bool, ranges: Ranges) -> TaggedOutput:
        snapshot = Snapshot(model, epoch, closed, ranges)
        return TaggedOutput(SNAPSHOTS, TimestampedValue(snapshot, self._seconds(epoch)))

    def _seconds(self, epoch: int) -> float:
        return epoch * self._epoch_ms / 1000


def _load(path: Path) -> Ranges:
    return Ranges.from_bytes(path.read_bytes())


def _by_model(pack: ScoredPack) -> tuple[str, ScoredPack]:
    return pack.model, pack
