"""Generations and acts, against recounting what is meant to be left and against the calendar."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from normal_traffic import DIRECTIONS, traffic

from pipeline.learning import Learned
from schemas.acts import Act, ActKind
from schemas.commit import Commit, Ledger, ModelState, Shift
from schemas.records import Segments
from transforms.ranges.generations import Calendar
from transforms.ranges.policies import Missing
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import Stretches

EMPTY = Ranges.empty(DIRECTIONS, "d" * 64, "a-model")
HOUR_MS = 3_600_000
HOURLY = Calendar(HOUR_MS, keep_days=2)
FIRST = 480_000
"""An epoch; of an hour each, it begins a day."""


@dataclass
class Memory:
    """Keeps ranges like a state directory, by bytes."""

    kept: dict[str, bytes] = field(default_factory=dict)

    def read_ranges(self, digest: str) -> Ranges:
        return Ranges.from_bytes(self.kept[digest])

    def write_ranges(self, ranges: Ranges) -> str:
        self.kept[ranges.hash] = ranges.to_bytes()
        return ranges.hash


def counts(seed: int, n: int = 3) -> Ranges:
    return EMPTY.plus(Stretches.of(traffic(n, seed))).plus_verdicts(n, 0)


def recounted(seeds: Iterable[int], n: int = 3) -> Ranges:
    segments = [traffic(n, seed) for seed in seeds]
    joined = Segments.joined([Segments.none(0, DIRECTIONS), *segments])
    return EMPTY.plus(Stretches.of(joined)).plus_verdicts(n * len(segments), 0)


def always(ranges: Ranges) -> Missing:
    return 0, 0


def never(ranges: Ranges) -> Missing:
    return 1, 1


def from_conversations(n: int) -> Callable[[Ranges], Missing]:
    return lambda ranges: (max(n - ranges.conversations.total, 0),) * 2


def act(kind: ActKind, number: int = 0, digest: str = "", generation: int | None = None) -> Act:
    return Act(f"{number}", kind, "a-model", "ann", number, "because", digest, generation)


@pytest.mark.parametrize("minutes", [1, 7, 10, 60, 1440, 4000])
def test_a_generation_is_the_day_in_which_an_epoch_begins(minutes: int) -> None:
    calendar, length = Calendar(minutes * 60_000), timedelta(minutes=minutes)
    epoch = 30_000_000 // minutes
    begins = [
        datetime(1970, 1, 1, tzinfo=UTC) + (epoch + number) * length for number in range(3000)
    ]
    days = [
        (begin - datetime(1970, 1, 1, tzinfo=UTC)) // max(length, timedelta(days=1))
        for begin in begins
    ]
    assert [calendar.generation(epoch + number) for number in range(3000)] == days
    ends = [number for number in range(2999) if days[number] != days[number + 1]]
    assert ends
    for end in ends:
        assert calendar.last_epoch(epoch + end) == epoch + end
        assert calendar.last_epoch(epoch + max(end - 1, 0)) in (epoch + end, epoch + end - 1)


EPOCHS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10**6)), min_size=1, max_size=12)


@given(steps=EPOCHS, base=st.integers(0, 1))
def test_what_is_left_is_what_recounting_the_days_that_are_kept_gives(
    steps: Sequence[tuple[int, int]], base: int
) -> None:
    """Epochs of an hour, hours apart, two days kept besides the present one."""
    before = [10**7] * base
    learned, epoch = Learned(recounted(before), Memory(), HOURLY), FIRST
    first_day, counted = (FIRST + steps[0][0]) // 24, []
    for hours, seed in steps:
        epoch += hours
        learned = learned.counted(epoch, counts(seed)).at(epoch + 1, never)
        counted.append((epoch // 24, seed))
        epoch += 1
        today = epoch // 24
        kept = [seed for day, seed in counted if day >= today - 2]
        kept += before if first_day - 1 >= today - 2 else []
        assert learned.total.hash == recounted(kept).hash
        held = [learned.store.read_ranges(each) for each in learned.generations.values()]
        assert reduce(Ranges.merged, held, EMPTY).hash == learned.total.hash


def test_expiry_makes_nobody_blind() -> None:
    learned = Learned(EMPTY, Memory(), HOURLY)
    for day in range(4):
        learned = learned.counted(FIRST + 24 * day, counts(day))
    months_later = FIRST + 24 * 90
    assert learned.at(months_later, always).total.hash == recounted([]).hash, "always: even then"
    seven = learned.at(months_later, from_conversations(7))
    assert seven.total.hash == recounted([1, 2, 3]).hash, "the newest that suffice stay"
    cannot = learned.at(months_later, from_conversations(100))
    assert cannot.total.hash == recounted([]).hash, "could not be judged before either"
    grown = seven.counted(months_later, counts(9)).at(months_later + 24, from_conversations(7))
    assert grown.total.hash == recounted([2, 3, 9]).hash


def test_little_traffic_is_waited_for_twelve_times_as_long() -> None:
    learned, needed = Learned(EMPTY, Memory(), HOURLY), from_conversations(60)
    for day in range(40):
        learned = learned.counted(FIRST + 24 * day, counts(day))
        learned = learned.at(FIRST + 24 * day + 24, needed)
        if day < 18:
            assert learned.total.hash == recounted(range(day + 1)).hash
    assert needed(learned.total)[0] == 0, "so it becomes calibrated"
    rare = from_conversations(10**6)
    for day in range(40, 70):
        learned = learned.counted(FIRST + 24 * day, counts(day)).at(FIRST + 24 * day + 24, rare)
    assert learned.total.hash == recounted(range(70 - 24, 70)).hash, "but not for ever"


def test_frozen_ranges_learn_nothing_and_forget_nothing() -> None:
    learned = Learned(EMPTY, Memory(), HOURLY).counted(FIRST, counts(1))
    frozen = learned.acted(act(ActKind.FREEZE), FIRST + 1)
    later = frozen.counted(FIRST + 1, counts(2)).at(FIRST + 24 * 90, always)
    assert later.total.hash == learned.total.hash
    thawed = later.acted(act(ActKind.THAW, 1), FIRST + 2).counted(FIRST + 2, counts(3))
    assert thawed.total.hash == recounted([1, 3]).hash


def test_a_rollback_forgets_later_days_and_what_was_accepted_on_them() -> None:
    memory = Memory()
    early, late = memory.write_ranges(counts(50)), memory.write_ranges(counts(60))
    learned = Learned(recounted([7]), memory, HOURLY)
    for day in range(4):
        learned = learned.counted(FIRST + 24 * day, counts(day))
        accepted = {1: early, 3: late}.get(day)
        if accepted:
            learned = learned.acted(act(ActKind.ACCEPT, day, accepted), FIRST + 24 * day + 5)
    assert accepted_of(learned) == recounted([50, 60]).hash
    to = FIRST // 24 + 1
    back = learned.acted(act(ActKind.ROLLBACK, 9, generation=to), FIRST + 24 * 3 + 6)
    assert replace(back.total, accepted=None).hash == recounted([7, 0, 1]).hash
    assert accepted_of(back) == counts(50).hash
    again = back.counted(FIRST + 24 * 3 + 7, counts(4)).at(FIRST + 24 * 5, always)
    assert replace(again.total, accepted=None).hash == recounted([4]).hash
    assert accepted_of(again) == counts(50).hash, "what a person accepted does not expire"


def accepted_of(learned: Learned) -> str | None:
    group = learned.total.accepted
    return None if group is None else group.hash


def test_a_base_is_not_lost_by_an_act_before_anything_was_counted() -> None:
    learned = Learned(recounted([7]), Memory(), HOURLY)
    for kind in (ActKind.FREEZE, ActKind.THAW):
        assert learned.acted(act(kind), FIRST).total.hash == learned.total.hash
    back = learned.acted(act(ActKind.ROLLBACK, generation=FIRST // 24 - 1), FIRST)
    assert back.total.hash == learned.total.hash


@given(st.permutations(range(5)))
def test_the_order_in_which_epochs_of_a_day_were_counted_does_not_matter(order: list[int]) -> None:
    learned = Learned(EMPTY, Memory(), HOURLY)
    for seed in order:
        learned = learned.counted(FIRST, counts(seed))
    assert learned.total.hash == recounted(range(5)).hash
    assert np.array_equal(
        [learned.store.read_ranges(each).hash for each in learned.generations.values()],
        [recounted(range(5)).hash],
    )


def test_generations_survive_the_way_through_a_commit() -> None:
    held = ModelState(
        "r",
        "o",
        Ledger(scored=3),
        "b",
        {-1: "x", 20_000: "y"},
        (act(ActKind.ROLLBACK, 1, generation=3),),
        Shift(4, 100, 50, 7),
    )
    commit = Commit(1, "c", (), 7, {"a-model": held}, Ledger(), Ledger(), {}, {})
    assert Commit.from_json(json.loads(json.dumps(commit.to_json()))) == commit
    assert held.hashes == {"r", "o", "x", "y"}


def test_one_accept_is_taken_back_and_nothing_else_is() -> None:
    memory = Memory()
    groups = [memory.write_ranges(counts(seed)) for seed in (50, 60)]
    learned = Learned(recounted([7]), memory, HOURLY).counted(FIRST, counts(1))
    for number, digest in enumerate(groups):
        learned = learned.acted(act(ActKind.ACCEPT, number, digest), FIRST + 1)
    learned = learned.counted(FIRST + 1, counts(2))
    revoke = replace(act(ActKind.REVOKE, 2), revoked="0")
    back = learned.acted(revoke, FIRST + 2)
    assert replace(back.total, accepted=None).hash == recounted([7, 1, 2]).hash
    assert accepted_of(back) == counts(60).hash
    later = back.counted(FIRST + 24, counts(3)).at(FIRST + 24 * 9, always)
    assert accepted_of(later) == counts(60).hash, "expiry does not bring it back"
    neither = later.acted(replace(revoke, revoked="1"), FIRST + 24 * 9)
    assert neither.total.accepted is None


def test_an_accept_before_anything_was_counted_is_kept_once() -> None:
    memory = Memory()
    group = memory.write_ranges(counts(50))
    learned = Learned(EMPTY, memory, HOURLY).acted(act(ActKind.ACCEPT, 0, group), FIRST)
    learned = learned.counted(FIRST, counts(1))
    assert accepted_of(learned) == counts(50).hash
    assert learned.generations == {FIRST // 24: counts(1).hash}
    later = learned.counted(FIRST + 24, counts(2))
    back = later.acted(act(ActKind.ROLLBACK, 1, generation=FIRST // 24), FIRST + 25)
    assert accepted_of(back) == counts(50).hash
    assert replace(back.total, accepted=None).hash == recounted([1]).hash
    gone = learned.at(FIRST + 24 * 90, always).counted(FIRST + 24 * 90, counts(3))
    assert accepted_of(gone) == counts(50).hash, "not either when all else had expired"


def test_a_group_that_came_with_the_base_goes_with_it() -> None:
    base = recounted([7]).accepting(counts(50))
    learned = Learned(base, Memory(), HOURLY).acted(act(ActKind.FREEZE), FIRST)
    learned = learned.acted(act(ActKind.THAW, 1), FIRST).counted(FIRST, counts(1))
    assert accepted_of(learned) == counts(50).hash
    assert learned.at(FIRST + 24 * 9, always).total.accepted is None


def test_a_rollback_to_a_day_of_which_nothing_is_left_is_not_done() -> None:
    memory = Memory()
    group = memory.write_ranges(counts(50))
    learned = Learned(EMPTY, memory, HOURLY).counted(FIRST, counts(1))
    learned = learned.acted(act(ActKind.ACCEPT, 0, group), FIRST + 24)
    learned = learned.counted(FIRST + 24, counts(2)).at(FIRST + 24 * 3, never)
    assert set(learned.generations) == {FIRST // 24 + 1}, "the day asked for has expired"
    kept = learned.acted(act(ActKind.ROLLBACK, 1, generation=FIRST // 24), FIRST + 24 * 3)
    assert kept.total.hash == learned.total.hash
    assert kept.generations == learned.generations
    assert [each.done for each in kept.acts] == [True, False]
    thawed = kept.acted(replace(act(ActKind.REVOKE, 2), revoked="x"), FIRST + 24 * 3)
    assert accepted_of(thawed) == counts(50).hash, "nor does it undo an accept later"
