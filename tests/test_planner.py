import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ConfigurationError, RunFailedError
from schemas.plan import Gap, PartitionId, PartitionProgress, PartitionSlice, Plan
from transforms.logs import planner
from transforms.logs.entries import Entry
from transforms.logs.planner import MAX_EPOCHS, Rules
from transforms.logs.times import MAX_AHEAD_MS, Dating, EventTime, clock_for

EPOCH = 10
NOW = 1_000_000
FAR = NOW + 10 * MAX_AHEAD_MS
IDLE = 1000
RULES = Rules(EventTime(None), EPOCH, IDLE)


@dataclass
class MemoryLog:
    """A log in memory. A slot is an entry, or None where an offset holds nothing to read."""

    source: str
    slots: dict[int, list[Entry | None]]
    bounded: bool
    timestamped: bool = True
    there: dict[int, int] = field(default_factory=dict)  # partition -> slots that have arrived
    deleted: Counter[int] = field(default_factory=Counter)  # partition -> slots that are gone
    address: str = "memory:"

    @property
    def uri(self) -> str:
        return self.address

    def partitions(self) -> list[int]:
        return list(self.there)

    def start(self, partition: int) -> int:
        return 0

    def earliest(self, partition: int) -> int:
        return self.deleted[partition]

    def end(self, partition: int) -> int:
        return self.there[partition]

    def read(self, partition: int, start: int, end: int) -> Iterator[Entry]:
        assert self.deleted[partition] <= start < end <= self.there[partition]
        return (entry for entry in self.slots[partition][start:end] if entry is not None)

    def arrive(self, partition: int, count: int) -> None:
        """Let `count` more slots arrive; the partition is there from now on."""
        arrived = self.there.get(partition, 0) + count
        self.there[partition] = min(arrived, len(self.slots[partition]))


class MemoryLogs:
    """Stands for `transforms.logs.open.Logs`."""

    def __init__(self, *logs: MemoryLog) -> None:
        self.logs = {log.source: log for log in logs}

    def log(self, partition: PartitionId) -> MemoryLog:
        return self.logs[partition.source]

    def partitions(self) -> list[PartitionId]:
        found = [(log.source, number) for log in self.logs.values() for number in log.partitions()]
        return [PartitionId(*each) for each in sorted(found)]

    def end(self, partition: PartitionId) -> int:
        return self.log(partition).end(partition.partition)

    def earliest(self, partition: PartitionId) -> int:
        return self.log(partition).earliest(partition.partition)

    @property
    def everything(self) -> dict[PartitionId, list[Entry | None]]:
        return {
            PartitionId(log.source, number): slots
            for log in self.logs.values()
            for number, slots in log.slots.items()
        }

    def arrive_all(self) -> None:
        for id, slots in self.everything.items():
            self.log(id).arrive(id.partition, len(slots))


@dataclass
class Reading:
    """What one record became: in which slice it was read, and how it was dated."""

    slice: int
    id: PartitionId
    offset: int
    dating: Dating


@dataclass
class Session:
    """Plans and commits as the loop of `watch` does, and keeps what a reader would have read."""

    logs: MemoryLogs
    rules: Rules = RULES
    clock_ms: int = NOW
    closed: int | None = None
    progress: tuple[PartitionProgress, ...] = ()
    plans: list[Plan] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    floors: dict[PartitionId, list[tuple[int, int]]] = field(default_factory=dict)
    """Where the planner itself moved a running maximum: (offset, to)."""

    def step(self, records: int = 1000) -> Plan | None:
        discovered = planner.discover(self.logs, self.progress, self.closed, self.rules)
        plan = self._plan(discovered, records)
        if plan is None:
            return None
        assert plan == self._plan(discovered, records), "the same inputs give the same plan"
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        self._note_floors(discovered, plan)
        for part in plan.partitions:
            self._read(part, plan)
        self.plans.append(plan)
        self.progress, self.closed = plan.after, plan.closed_after
        return plan

    def run(self, records: int = 1000) -> list[Plan]:
        """Plans until there are no more."""
        before = len(self.plans)
        while self.step(records) is not None:
            assert len(self.plans) < 10_000
        return self.plans[before:]

    def _plan(self, discovered: Sequence[PartitionProgress], records: int) -> Plan | None:
        return planner.plan(
            self.logs,
            discovered,
            self.closed,
            self.rules,
            records,
            number=len(self.plans) + 1,
            clock_ms=self.clock_ms,
            config_hash="c",
        )

    def _note_floors(self, discovered: Sequence[PartitionProgress], plan: Plan) -> None:
        known = {each.id for each in self.progress}
        moved = [each for each in discovered if each.id not in known]
        moved += [each for each in plan.after if each.id in plan.idle]
        for each in moved:
            if each.running_max is not None:
                self.floors.setdefault(each.id, []).append((each.offset, each.running_max))

    def _read(self, part: PartitionSlice, plan: Plan) -> None:
        log = self.logs.log(part.id)
        clock = clock_for(
            self.rules.event_time,
            log.timestamped,
            self.rules.epoch_ms,
            part.running_max,
            plan.clock_ms,
        )
        read = [
            Reading(plan.number, part.id, entry.offset, clock.date(entry))
            for entry in log.read(part.id.partition, part.start, part.end)
        ]
        self.readings += read
        after = next(each for each in plan.after if each.id == part.id)
        assert after.offset == part.end
        assert after.running_max == clock.running_max or part.id in plan.idle
        firsts: dict[int | None, int] = {}
        for each in read:
            firsts.setdefault(each.dating.epoch, each.offset)
        firsts.pop(None, None)
        assert part.cuts == tuple(firsts.items())


def one_log(*partitions: Sequence[int | None], bounded: bool = True) -> MemoryLogs:
    """A log with these times, all there at once where it is bounded."""
    slots = {number: entries(times) for number, times in enumerate(partitions)}
    logs = MemoryLogs(MemoryLog("log", slots, bounded))
    for number in slots:
        logs.logs["log"].arrive(number, 0)
    if bounded:
        logs.arrive_all()
    return logs


def entries(times: Sequence[int | None], size: int = 1) -> list[Entry | None]:
    return [Entry(offset, offset + 1, time, b"x" * size) for offset, time in enumerate(times)]


def part(number: int) -> PartitionId:
    return PartitionId("log", number)


# The oracle: every partition seen whole, every record dated by looking at all before it.


def oracle(session: Session) -> dict[tuple[PartitionId, int], tuple[int | None, int | None, bool]]:
    return {
        (id, entry.offset): dated_by_oracle(entry, slots, session.floors.get(id, []))
        for id, slots in session.logs.everything.items()
        for entry in slots
        if entry is not None
    }


def usable(entry: Entry | None) -> bool:
    return entry is not None and entry.timestamp is not None and 0 <= entry.timestamp < FAR


def dated_by_oracle(
    entry: Entry, slots: Sequence[Entry | None], floors: Sequence[tuple[int, int]]
) -> tuple[int | None, int | None, bool]:
    before = [each.timestamp for each in slots[: entry.offset] if usable(each)]
    before += [to for offset, to in floors if offset <= entry.offset]
    own = [entry.timestamp] if usable(entry) else []
    if not before + own:
        return None, None, False
    effective = max(before + own)
    late = bool(before and own) and own[0] // EPOCH < max(before) // EPOCH
    return effective // EPOCH, effective, late


# What must hold of every session, whatever the log and however it arrived.


def check(session: Session, most: int) -> None:
    check_every_entry_is_read_once(session)
    check_dating(session)
    check_no_epoch_overtakes_another(session)
    for plan in session.plans:
        check_plan(plan, [each for each in session.readings if each.slice == plan.number], most)
    for before, after in pairwise(session.plans):
        assert after.closed_epoch == before.closed_after


def check_every_entry_is_read_once(session: Session) -> None:
    assert Counter((each.id, each.offset) for each in session.readings) == Counter(
        (id, entry.offset)
        for id, slots in session.logs.everything.items()
        for entry in slots
        if entry is not None
    )


def check_dating(session: Session) -> None:
    expected = oracle(session)
    for each in session.readings:
        dating = each.dating
        found = (dating.epoch, dating.effective_time, dating.late)
        # An undated record before the first dated one has no epoch that anyone asks for.
        assert found == expected[each.id, each.offset] or dating.epoch is None


def check_no_epoch_overtakes_another(session: Session) -> None:
    """A record is read only once all of all earlier epochs are, in its slice or before."""
    by_epoch: dict[int, list[int]] = {}
    for each in session.readings:
        if each.dating.epoch is not None:
            by_epoch.setdefault(each.dating.epoch, []).append(each.slice)
    last = 0
    for _, slices in sorted(by_epoch.items()):
        assert last <= min(slices)
        last = max(slices)


def check_plan(plan: Plan, read: Sequence[Reading], most: int) -> None:
    assert plan.records == len(read) <= most
    assert read or plan.complete_through is not None
    epochs = [each.dating.epoch for each in read if each.dating.epoch is not None]
    if epochs:
        # Nothing of an epoch that was said to be complete, and no more than the judge can hold.
        assert plan.closed_before is not None
        assert plan.closed_before < min(epochs) <= max(epochs) <= plan.closed_before + MAX_EPOCHS
    if plan.complete_through is not None:
        assert plan.closed_before is not None
        assert plan.closed_before < plan.complete_through
        assert not epochs or plan.complete_through <= max(epochs)


# Random logs.

BAD = st.sampled_from([None, FAR, -1])
TIMES = st.one_of(
    st.integers(0, 60), st.integers(0, 200), st.sampled_from([20_000, 20_005, 20_200]), BAD
)


@st.composite
def slots(draw: st.DrawFn) -> list[Entry | None]:
    """A partition: nearly sorted or wild times, bad ones among them, and holes."""
    times = draw(st.lists(TIMES, max_size=20))
    if draw(st.booleans()):
        times.sort(key=lambda time: time or 0)
    found = entries(times)
    for hole in draw(st.lists(st.integers(0, 19), max_size=3)):
        if hole < len(found):
            found[hole] = None
    return found


PARTITIONS = st.lists(slots(), min_size=1, max_size=4)
LIMITS = st.integers(1, 12)
STEPS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=4),  # arrivals
        st.sampled_from([0, 1, IDLE // 2, IDLE]),  # time that passes
        LIMITS,
    ),
    max_size=8,
)


@given(PARTITIONS, LIMITS)
@settings(max_examples=300)
def test_a_finished_log_is_read_to_its_end(partitions: list[list[Entry | None]], most: int) -> None:
    logs = MemoryLogs(MemoryLog("log", dict(enumerate(partitions)), bounded=True))
    logs.arrive_all()
    session = Session(logs)
    session.run(most)
    check(session, most)
    epochs = [each.dating.epoch for each in session.readings if each.dating.epoch is not None]
    assert not epochs or session.closed == max(epochs)
    assert not session.floors


def test_a_log_that_had_been_read_to_its_end_goes_on_in_the_open_epoch() -> None:
    session = Session(one_log([1, 55], [3]))
    session.run()
    assert session.closed == 5
    log = session.logs.logs["log"]
    for number, times in enumerate(([1, 55, 57, 81], [3, 4])):
        log.slots[number] = entries(times)
    session.logs.arrive_all()
    before = len(session.readings)
    session.run()
    found = [(r.id.partition, r.dating.epoch, r.dating.late) for r in session.readings[before:]]
    assert sorted(found) == [(0, 6, True), (0, 8, False), (1, 6, True)]
    assert session.closed == 8


def test_a_log_without_times_that_has_grown_after_its_end_is_refused() -> None:
    session = Session(one_log([1]))
    session.logs.logs["log"].timestamped = False
    session.run()
    assert session.closed == 0
    session.logs.logs["log"].slots[0] = entries([1, 2])
    session.logs.arrive_all()
    with pytest.raises(ConfigurationError, match="log has more than when it had been read to its"):
        session.step()


def test_a_log_is_read_where_it_is_now() -> None:
    session = Session(one_log([1], bounded=False))
    session.logs.arrive_all()
    session.step()
    moved = MemoryLog("log", {0: entries([1, 2])}, bounded=False)
    moved.arrive(0, 2)
    moved.address = "memory:elsewhere"
    session.logs = MemoryLogs(moved)
    plan = session.step()
    assert plan is not None
    assert [part.uri for part in plan.partitions] == ["memory:elsewhere"]
    assert [each.uri for each in session.progress] == ["memory:elsewhere"]


def test_what_a_plan_reads_is_counted_again() -> None:
    session = Session(one_log([1, 2, 3], [4]))
    plan = session._plan(planner.discover(session.logs, (), None, RULES), 10)
    assert plan is not None
    assert planner.holds(session.logs, plan)
    session.logs.logs["log"].slots[0][1] = None
    assert not planner.holds(session.logs, plan)


def test_the_last_epoch_closes_though_the_last_slice_was_full_before_all_was_seen() -> None:
    session = Session(one_log([10], [0]))
    spans = [(plan.records, plan.complete_through) for plan in session.run(1)]
    assert spans == [(1, 0), (1, None), (0, 1)]


@given(PARTITIONS, st.sets(st.integers(0, 3)), STEPS)
@settings(max_examples=500)
def test_a_log_is_read_as_it_arrives(
    partitions: list[list[Entry | None]],
    there_at_first: set[int],
    steps: list[tuple[list[tuple[int, int]], int, int]],
) -> None:
    """Partitions grow, fall silent and are added while the log is read."""
    log = MemoryLog("log", dict(enumerate(partitions)), bounded=False)
    for number in there_at_first & log.slots.keys():
        log.arrive(number, 0)
    session = Session(MemoryLogs(log))
    for arrivals, passes, most in steps:
        for number, count in arrivals:
            if number in log.slots:
                log.arrive(number, count)
        session.clock_ms += passes
        session.step(most)
    session.logs.arrive_all()
    finish(session)
    check(session, 12)


@given(PARTITIONS, PARTITIONS, LIMITS)
@settings(max_examples=100)
def test_finished_and_growing_logs_are_read_together(
    finished: list[list[Entry | None]], growing: list[list[Entry | None]], most: int
) -> None:
    logs = MemoryLogs(
        MemoryLog("finished", dict(enumerate(finished)), bounded=True),
        MemoryLog("growing", dict(enumerate(growing)), bounded=False),
    )
    logs.logs["finished"].there = {n: len(slots) for n, slots in enumerate(finished)}
    logs.logs["growing"].there = dict.fromkeys(range(len(growing)), 0)
    session = Session(logs)
    session.run(most)
    logs.arrive_all()
    finish(session, most)
    check(session, max(most, 12))


def finish(session: Session, most: int = 12) -> None:
    """Read what there is, and let partitions fall silent until nothing is held back any more."""
    session.run(most)
    session.clock_ms += IDLE
    while session.run(most):
        # What a silent partition had still to be read makes it wait for more once again.
        session.clock_ms += IDLE
    epochs = [each.dating.epoch for each in session.readings if each.dating.epoch is not None]
    # The newest epoch stays open: more may come. Before any is closed, none before it is left.
    assert not epochs or session.closed == max(epochs) - 1


# Named examples.


def test_a_silent_partition_takes_over_the_others_time_after_a_while() -> None:
    logs = one_log([5, 25], [5], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    assert [plan.records for plan in session.run()] == [2]  # epoch 2 waits for partition 1
    session.clock_ms += IDLE - 1
    assert session.run() == []
    session.clock_ms += 1
    first, *_ = session.run()
    assert first.idle == (part(1),) and first.records == 1
    assert first.after[1].running_max == 25
    assert session.closed == 1
    logs.log(part(1)).slots[1] += [Entry(1, 2, 17, b"x")]
    logs.arrive_all()
    session.run()
    assert session.readings[-1].dating == Dating(17, 25, 2, late=True)


def test_an_empty_partition_holds_nobody_back() -> None:
    logs = one_log([5, 15, 25], [], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    (plan,) = session.run()
    assert (plan.records, plan.complete_through, plan.idle) == (3, 1, (part(1),))


def test_a_partition_that_ends_in_holes_falls_silent_like_any_other() -> None:
    """Transaction markers stand at the end of every partition a transactional producer writes."""
    logs = one_log([5, 25, 35], [5], bounded=False)
    logs.log(part(1)).slots[1].append(None)
    log = logs.log(part(0))
    log.arrive(1, 2)
    log.arrive(0, 1)
    session = Session(logs)
    session.run()
    for _ in range(2):  # plans are made meanwhile: they must not take the hole for news
        log.arrive(0, 1)
        session.clock_ms += IDLE // 2
        session.run()
    assert len(session.readings) == 4


def test_a_gap_of_a_thousand_epochs_is_crossed_by_a_plan_without_records() -> None:
    session = Session(one_log([5, 5 + 1000 * EPOCH, 1010 * EPOCH]))
    plans = session.run()
    spans = [(plan.records, plan.closed_before, plan.complete_through) for plan in plans]
    assert spans == [(1, -1, 0), (0, 0, 999), (1, 999, 1000), (0, 1000, 1009), (1, 1009, 1010)]


def test_times_that_are_not_believed_do_not_move_the_running_maximum() -> None:
    session = Session(one_log([5, FAR, 6, NOW + MAX_AHEAD_MS + 1, -3, None, 7]))
    session.run()
    assert {each.dating.epoch for each in session.readings} == {0}
    errors = [each.dating.error is not None for each in session.readings]
    assert errors == [False, True, False, True, True, True, False]


def test_a_partition_of_bad_times_only_holds_nobody_back() -> None:
    logs = one_log([5, 15, 25], [FAR, None, -1], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.run()
    assert len(session.readings) == 6


def test_a_slice_is_bounded_by_bytes_but_holds_at_least_one_record() -> None:
    logs = one_log([])
    logs.log(part(0)).slots[0] = entries([1] * 6, size=10)
    logs.arrive_all()
    session = Session(logs, replace(RULES, bytes=30))
    assert [plan.records for plan in session.run()] == [3, 3]
    session = Session(logs, replace(RULES, bytes=5))
    assert [plan.records for plan in session.run()] == [1] * 6


def test_tombstones_are_entries_without_bytes() -> None:
    logs = one_log([1, 2])
    logs.log(part(0)).slots[0] = [Entry(0, 1, 1, None), Entry(1, 2, 2, b"x" * 9)]
    assert [plan.records for plan in Session(logs, replace(RULES, bytes=9)).run()] == [2]


def test_a_partition_that_is_added_starts_in_the_open_epoch() -> None:
    logs = one_log([5, 15, 25, 35], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.run()
    assert session.closed == 2
    logs.log(part(0)).slots[1] = entries([3, 31])
    logs.arrive_all()
    session.run()
    assert [each.dating for each in session.readings if each.id == part(1)] == [
        Dating(3, 30, 3, late=True),
        Dating(31, 31, 3),
    ]


def test_an_empty_partition_that_is_added_holds_nobody_back() -> None:
    logs = one_log([5, 15], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.run()
    log = logs.log(part(0))
    log.slots |= {1: [], 0: entries([5, 15, 25])}
    logs.arrive_all()
    for _ in range(2):  # asked for again and again, as `watch` does
        session.run()
    assert len(session.readings) == 3


def test_a_log_without_times_is_one_epoch_that_ends_with_it() -> None:
    log = MemoryLog("log", {0: entries([None] * 5)}, bounded=True, timestamped=False)
    other = MemoryLog("other", {0: entries([None] * 5)}, bounded=True, timestamped=False)
    logs = MemoryLogs(log, other)
    logs.arrive_all()
    session = Session(logs)
    plans = session.run(4)
    assert [plan.records for plan in plans] == [4, 4, 2]
    assert [plan.closed_after for plan in plans] == [-1, -1, 0]
    assert {each.dating for each in session.readings} == {Dating(None, None, 0)}


def test_a_clock_that_is_set_back_disbelieves_nothing_it_believed() -> None:
    """Else an epoch that was complete by the first plan would get another record."""
    edge = NOW + MAX_AHEAD_MS
    edge -= edge % EPOCH
    logs = one_log([5, edge, 15], [5, edge], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    assert session.step(1) is not None
    session.step()
    session.clock_ms -= 5000
    finish(session)
    check(session, 1000)


def test_a_partition_that_ends_before_what_was_read_is_an_error() -> None:
    """A topic that was deleted and made anew starts again at 0."""
    logs = one_log([5, 6, 7], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.run()
    logs.log(part(0)).there[0] = 1
    with pytest.raises(RunFailedError, match="ends at 1, before offset 3"):
        session.run()


def test_nothing_is_planned_where_there_is_nothing() -> None:
    assert Session(one_log([], [])).run() == []
    assert Session(MemoryLogs()).run() == []


def test_records_that_the_log_deleted_unread_are_a_gap_that_is_counted() -> None:
    logs = one_log([5, 6, 7, 8, 9], [5], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.step(1)
    logs.log(part(0)).deleted[0] = 4
    plan = session.step()
    assert plan is not None
    assert plan.gaps == (Gap(part(0), 1, 4),)
    assert plan.lost == 3
    assert [reading.offset for reading in session.readings if reading.id == part(0)] == [0, 4]


def test_a_gap_is_reported_even_where_nothing_is_left_to_read() -> None:
    logs = one_log([5, 6, 7], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.step(2)
    logs.log(part(0)).deleted[0] = 3
    (plan,) = session.run()
    assert (plan.records, plan.lost) == (0, 1)
    assert session.run() == []


def test_a_plan_is_readable_until_the_log_deletes_a_part_of_it() -> None:
    logs = one_log([5, 6, 7], bounded=False)
    logs.arrive_all()
    session = Session(logs)
    session.step(1)
    plan = session._plan(session.progress, 1000)
    assert plan is not None
    logs.log(part(0)).deleted[0] = 1
    assert planner.readable(logs, plan)
    logs.log(part(0)).deleted[0] = 2
    assert not planner.readable(logs, plan)


def test_plans_of_an_older_format_are_read_and_newer_ones_refused() -> None:
    logs = one_log([5, 6])
    plan = Session(logs)._plan(planner.discover(logs, (), None, RULES), 1000)
    assert plan is not None
    older = {
        name: value for name, value in plan.to_json().items() if name not in ("format", "gaps")
    }
    assert Plan.from_json(json.loads(json.dumps(older))) == plan
    with pytest.raises(ValueError, match="format 3"):
        Plan.from_json({**plan.to_json(), "format": 3})
