"""Plans slices: which records are read next, and which epochs they complete.

An epoch is read only once every partition has reached its start, so a conversation can be judged
against ranges of all epochs before its own. `plan` is a pure function of what it is given and of
what the logs hold.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

from schemas.errors import ConfigurationError, RunFailedError
from schemas.plan import Gap, PartitionId, PartitionProgress, PartitionSlice, Plan
from transforms.logs.entries import Entry
from transforms.logs.open import Logs
from transforms.logs.times import EpochClock, EventTime, NoClock, clock_for
from transforms.ranges.generations import Calendar

MAX_EPOCHS = 8
"""Consecutive epochs a slice may span: what the judge can hold."""

_NEVER = float("inf")


@dataclass(frozen=True)
class Rules:
    """What does not change from plan to plan.

    Attributes:
      event_time: what dates a record.
      epoch_ms: length of an epoch.
      idle_ms: how long a partition may be silent before it no longer holds the others back.
      bytes: most bytes of values in a slice.
    """

    event_time: EventTime
    epoch_ms: int
    idle_ms: int = 30_000
    bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A record that could be read."""

    epoch: float  # -inf where nothing in its partition is dated yet
    partition: PartitionId
    offset: int
    next_offset: int
    size: int
    running_max: int | None  # after it


@dataclass
class _Peek:
    """What lies ahead in a partition."""

    progress: PartitionProgress
    clock: EpochClock | NoClock
    candidates: list[_Candidate] = field(default_factory=list)
    exhausted: bool = True  # all there is now is among the candidates
    finished: bool = False  # and there will be no more
    floor: float = -_NEVER  # an epoch it has come to, whatever its clock says
    idle: bool = False

    @property
    def reach(self) -> float:
        """The epoch the partition is known to have come to."""
        if self.finished:
            return _NEVER
        return -_NEVER if self.clock.epoch is None else max(self.clock.epoch, self.floor)

    def begin(self, closed: int | None, epoch_ms: int) -> None:
        """Let what is read now be of the open epoch at least.

        Otherwise so only where a log had been read to its end, which closes all epochs, and grew.
        """
        opened = 0 if closed is None else (closed + 1) * epoch_ms
        if self.clock.running_max is not None and self.clock.running_max < opened:
            self.clock.running_max = opened
            self.progress = replace(self.progress, running_max=opened)


def discover(
    logs: Logs,
    known: Sequence[PartitionProgress],
    closed_epoch: int | None,
    rules: Rules,
) -> tuple[PartitionProgress, ...]:
    """Progress of all partitions there are: those known, and new ones from their beginning.

    At the very first look partitions begin where their URI says; one that is added later begins
    with its first record, in the epoch that is open then. While it is empty it counts as silent.
    """
    opened = None if closed_epoch is None else (closed_epoch + 1) * rules.epoch_ms
    # Under their present addresses: brokers and files may have moved.
    progress = {each.id: replace(each, uri=logs.log(each.id).uri) for each in known}
    for partition in logs.partitions():
        if partition not in progress:
            log = logs.log(partition)
            begin = log.earliest if known else log.start
            offset = begin(partition.partition)
            progress[partition] = PartitionProgress(partition, log.uri, offset, opened, 0)
    return tuple(progress[partition] for partition in sorted(progress))


def readable(logs: Logs, begun: Plan) -> bool:
    """Whether the logs still keep everything that a plan reads."""
    return all(logs.earliest(part.id) <= part.start for part in begun.partitions)


def holds(logs: Logs, begun: Plan) -> bool:
    """Whether the logs still have every record of a plan: compaction takes single ones away."""
    read = (
        logs.log(part.id).read(part.id.partition, part.start, part.end) for part in begun.partitions
    )
    return sum(1 for entries in read for _ in entries) == begun.records


def plan(
    logs: Logs,
    progress: Sequence[PartitionProgress],
    closed_epoch: int | None,
    rules: Rules,
    records: int,
    *,
    number: int,
    clock_ms: int,
    config_hash: str,
    only_open: bool = False,
) -> Plan | None:
    """The next slice; None where nothing can be read, no epoch closed and nothing was deleted.

    Args:
      logs: what is read.
      progress: of every partition, in order (`discover`).
      closed_epoch: newest closed epoch; None: none yet.
      rules: what dates records and bounds slices.
      records: most records in the slice.
      number: of the slice.
      clock_ms: now.
      config_hash: of the configuration.
      only_open: read nothing beyond the epoch that is open.

    Raises:
      LogError: a log cannot be read on, for now.
      RunFailedError: a log ends before what was read of it.
      ConfigurationError: a log without times has grown after its one epoch was closed.
    """
    # A clock that is set back must not disbelieve what an earlier plan believed.
    clock_ms = max(clock_ms, *(each.last_new_ms for each in progress), 0)
    gaps = _gaps(logs, progress)
    progress = _beyond(gaps, progress)
    peeks = _peek_all(logs, progress, closed_epoch, rules, records, clock_ms)
    _advance_idle(peeks, rules, clock_ms)
    barrier = min((peek.reach for peek in peeks), default=_NEVER)
    chosen, left = _choose(peeks, barrier, closed_epoch, records, rules, only_open)
    complete = _complete(chosen, left, barrier, closed_epoch, _latest_epoch(peeks))
    read = _by_partition(chosen)
    if not chosen and complete is None and not gaps:
        return None
    return Plan(
        number=number,
        clock_ms=clock_ms,
        config_hash=config_hash,
        closed_epoch=closed_epoch,
        complete_through=complete,
        partitions=tuple(_slices(read, peeks)),
        records=len(chosen),
        after=tuple(_after(peek, read) for peek in peeks),
        idle=tuple(peek.progress.id for peek in peeks if peek.idle),
        gaps=gaps,
    )


def _gaps(logs: Logs, progress: Iterable[PartitionProgress]) -> tuple[Gap, ...]:
    """What was deleted in front of the offsets that are read next."""
    kept = ((each, logs.earliest(each.id)) for each in progress)
    return tuple(Gap(each.id, each.offset, first) for each, first in kept if first > each.offset)


def _beyond(gaps: Iterable[Gap], progress: Sequence[PartitionProgress]) -> list[PartitionProgress]:
    ends = {gap.id: gap.end for gap in gaps}
    return [replace(each, offset=ends.get(each.id, each.offset)) for each in progress]


def _peek_all(
    logs: Logs,
    progress: Sequence[PartitionProgress],
    closed: int | None,
    rules: Rules,
    records: int,
    clock_ms: int,
) -> list[_Peek]:
    """Look into partitions in order, until records of the open epoch alone fill the slice."""
    opened = -_NEVER if closed is None else closed + 1
    peeks, ready = [], 0
    for each in progress:
        peek = _closed_peek(logs, each, rules, clock_ms)
        if ready >= records and peek.clock.epoch is not None:
            # Nothing of it would be chosen; all it has left belongs to the open epoch or later.
            peek.exhausted, peek.floor = False, opened
        else:
            _look(peek, logs, rules, records, closed, clock_ms)
            ready += sum(candidate.epoch <= opened for candidate in peek.candidates)
        peeks.append(peek)
    return peeks


def _closed_peek(logs: Logs, progress: PartitionProgress, rules: Rules, clock_ms: int) -> _Peek:
    timestamped = logs.log(progress.id).timestamped
    clock = clock_for(rules.event_time, timestamped, rules.epoch_ms, progress.running_max, clock_ms)
    return _Peek(progress, clock)


def _look(
    peek: _Peek, logs: Logs, rules: Rules, records: int, closed: int | None, clock_ms: int
) -> None:
    progress = peek.progress
    log, end = logs.log(progress.id), logs.end(progress.id)
    if progress.last_new_ms and end < progress.offset:
        raise RunFailedError(
            f"{progress.id.source}/{progress.id.partition} ends at {end}, before offset "
            f"{progress.offset} that was reached; if the topic was made anew, give another --state"
        )
    if end > progress.offset:
        entries = log.read(progress.id.partition, progress.offset, end)
        first = next(entries, None)
        if first is not None:  # holes, such as transaction markers, are no news
            peek.begin(closed, rules.epoch_ms)
            peek.progress = replace(peek.progress, last_new_ms=clock_ms)
            window = _NEVER if closed is None else closed + MAX_EPOCHS
            peek.exhausted = _fill(peek, chain([first], entries), records, rules.bytes, window)
    peek.finished = log.bounded and peek.exhausted


def _fill(
    peek: _Peek, entries: Iterable[Entry], records: int, max_bytes: int, window: float
) -> bool:
    """Take entries up to the limits, and the first one beyond the window; whether that was all."""
    size = 0
    for entry in entries:
        beyond = peek.candidates and peek.candidates[-1].epoch > window
        if beyond or len(peek.candidates) >= records or size >= max_bytes:
            return False
        dating = peek.clock.date(entry)
        length = len(entry.value or b"")
        epoch = -_NEVER if dating.epoch is None else dating.epoch
        peek.candidates.append(
            _Candidate(
                epoch,
                peek.progress.id,
                entry.offset,
                entry.next_offset,
                length,
                peek.clock.running_max,
            )
        )
        size += length
    return True


def _advance_idle(peeks: Sequence[_Peek], rules: Rules, clock_ms: int) -> None:
    """Let silent partitions take the others' maximum time, so that they hold nobody back."""
    times = [peek.clock.running_max for peek in peeks if peek.clock.running_max is not None]
    for peek in peeks:
        silent = clock_ms - peek.progress.last_new_ms >= rules.idle_ms and not peek.candidates
        # What lies behind the end of a peek may still be dated, and early.
        waiting = peek.exhausted and not peek.finished
        if times and waiting and (silent or peek.clock.epoch is None):
            peek.idle = True
            peek.clock.running_max = max(times)


def _choose(
    peeks: Sequence[_Peek],
    barrier: float,
    closed: int | None,
    records: int,
    rules: Rules,
    only_open: bool,
) -> tuple[list[_Candidate], list[_Candidate]]:
    """The candidates that are read in this slice, and those that are not."""
    ahead = [candidate for peek in peeks for candidate in peek.candidates]
    ahead.sort(key=lambda candidate: (candidate.epoch, candidate.partition, candidate.offset))
    first = closed + 1 if closed is not None else _first_epoch(ahead)
    if ahead and -_NEVER < ahead[0].epoch < first:
        raise ConfigurationError(
            f"{ahead[0].partition.source} has more than when it had been read to its end; give "
            f"another --state"
        )
    # A slice keeps to one day: what expires at its end is taken out of the ranges between slices.
    day_ends = Calendar(rules.epoch_ms).last_epoch(int(first))
    last = min(barrier, first if only_open else first + MAX_EPOCHS - 1, day_ends)
    size, count = 0, 0
    for candidate in ahead:
        over = count >= records or (count > 0 and size + candidate.size > rules.bytes)
        if over or candidate.epoch > last:
            break
        size, count = size + candidate.size, count + 1
    return ahead[:count], ahead[count:]


def _first_epoch(ahead: Iterable[_Candidate]) -> float:
    return min((each.epoch for each in ahead if each.epoch > -_NEVER), default=0)


def _complete(
    chosen: Sequence[_Candidate],
    left: Sequence[_Candidate],
    barrier: float,
    closed: int | None,
    latest: float,
) -> int | None:
    """The newest epoch that has no records beyond the slice; None where none is closed anew."""
    dated = [each.epoch for each in chosen if each.epoch > -_NEVER]
    newest = min(barrier, min((each.epoch for each in left), default=_NEVER)) - 1
    # The judge goes from epoch to epoch; a longer gap is crossed by a plan without records.
    newest = min(newest, max(dated, default=latest))
    before = closed if closed is not None else min(dated, default=_NEVER) - 1
    return int(newest) if before < newest else None


def _latest_epoch(peeks: Iterable[_Peek]) -> float:
    """The newest epoch that any partition has come to."""
    epochs = [peek.clock.epoch for peek in peeks if peek.clock.epoch is not None]
    return max(epochs, default=-_NEVER)


def _by_partition(chosen: Iterable[_Candidate]) -> Mapping[PartitionId, list[_Candidate]]:
    read = defaultdict(list)
    for candidate in chosen:
        read[candidate.partition].append(candidate)
    return read


def _slices(
    read: Mapping[PartitionId, list[_Candidate]], peeks: Sequence[_Peek]
) -> Iterable[PartitionSlice]:
    for peek in peeks:
        if mine := read.get(peek.progress.id):
            progress = peek.progress
            yield PartitionSlice(
                progress.id,
                progress.uri,
                progress.offset,
                mine[-1].next_offset,
                progress.running_max,
                _cuts(mine),
            )


def _cuts(candidates: Sequence[_Candidate]) -> tuple[tuple[int, int], ...]:
    by_epoch = groupby(candidates, key=lambda candidate: candidate.epoch)
    return tuple(
        (int(epoch), next(members).offset) for epoch, members in by_epoch if epoch > -_NEVER
    )


def _after(peek: _Peek, read: Mapping[PartitionId, list[_Candidate]]) -> PartitionProgress:
    progress = peek.progress
    if mine := read.get(progress.id):
        last = mine[-1]
        progress = replace(progress, offset=last.next_offset, running_max=last.running_max)
    return replace(progress, running_max=peek.clock.running_max) if peek.idle else progress
