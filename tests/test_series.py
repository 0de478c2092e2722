"""Series and stretches against loops over roles, directions and sides."""

import math
from collections.abc import Sequence

import numpy as np
from extremes import segments_from, whole
from hypothesis import given
from hypothesis import strategies as st

from schemas.records import ABSENT, STEPS_PER_UNIT, Role, Segments, Side
from transforms.ranges.series import Stretches, per_series, series_at, series_of_role

DIRECTIONS = 3

Vector = st.lists(
    st.integers(-STEPS_PER_UNIT, STEPS_PER_UNIT), min_size=DIRECTIONS, max_size=DIRECTIONS
)
Conversations = st.lists(
    st.lists(st.tuples(st.sampled_from([0, 1]), Vector, Vector), max_size=5), max_size=5
).map(lambda rows: segments_from(rows, DIRECTIONS))
Key = tuple[int, int]


def by_key(stretches: Stretches) -> list[tuple[int, int, list[int]]]:
    """Conversation, role and values, one stretch after the other."""
    columns = (stretches.row, stretches.role, stretches.values)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def grouped(stretches: Stretches) -> dict[Key, list[list[int]]]:
    """Values of all stretches of each conversation and role, ordered by these."""
    found: dict[Key, list[list[int]]] = {}
    for row, role, values in sorted(by_key(stretches), key=lambda each: each[:2]):
        found.setdefault((row, role), []).append(values)
    return found


def largest(values: Sequence[Sequence[int]]) -> list[int]:
    """Of every series the largest value."""
    return [max(column) for column in zip(*values, strict=True)]


@given(Conversations)
def test_every_value_is_the_extreme_its_series_is_about(segments: Segments) -> None:
    stretches = Stretches.of(segments)
    assert stretches.conversations == segments.conversations
    assert stretches.values.shape == (len(segments.row), 2 * DIRECTIONS)
    assert stretches.values.dtype == np.int16
    for place, (row, role, values) in enumerate(by_key(stretches)):
        assert (row, role) == (segments.row[place], segments.role[place])
        for index, value in zip(series_of_role(Role(role), DIRECTIONS), values, strict=True):
            series = series_at(int(index), DIRECTIONS)
            side = segments.high if series.side is Side.HIGH else segments.low
            assert series.role == role
            assert series.cosine(value) == side[place, series.direction]


def test_every_series_belongs_to_one_role() -> None:
    series = np.concatenate([series_of_role(role, DIRECTIONS) for role in Role])
    assert sorted(series) == list(range(4 * DIRECTIONS))
    for role in Role:
        assert {series_at(i, DIRECTIONS).role for i in series_of_role(role, DIRECTIONS)} == {role}


def test_series_stand_in_the_order_that_is_documented() -> None:
    expected = [
        (role, direction, side)
        for side in (Side.HIGH, Side.LOW)
        for role in (Role.USER, Role.ASSISTANT)
        for direction in range(DIRECTIONS)
    ]
    assert [series_at(i, DIRECTIONS) for i in range(4 * DIRECTIONS)] == expected


@given(Conversations)
def test_a_whole_stretch_is_the_largest_of_all_that_a_conversation_has(segments: Segments) -> None:
    apart = Stretches.of(segments)
    joined = apart.whole()
    expected = [(*key, largest(values)) for key, values in grouped(apart).items()]
    assert by_key(joined) == expected
    assert joined.conversations == segments.conversations
    types = [array.dtype for array in (joined.row, joined.role, joined.values)]
    assert types == [np.int32, np.int8, np.int16]
    assert by_key(joined.whole()) == expected


@given(Conversations, st.integers(1, 6))
def test_of_many_stretches_of_a_role_some_are_kept(segments: Segments, most: int) -> None:
    apart = Stretches.of(segments)
    spread = apart.spread(most)
    assert spread.conversations == segments.conversations
    kept, given_ = grouped(spread), grouped(apart)
    assert kept.keys() == given_.keys()
    for key, values in given_.items():
        ends = [math.ceil(len(values) * (part + 1) / most) for part in range(most)]
        assert kept[key] == ([values[end - 1] for end in ends] if len(values) > most else values)
    if most >= 5:
        assert by_key(spread) == by_key(apart)


@given(Conversations)
def test_whole_stretches_are_the_extremes_of_whole_conversations(segments: Segments) -> None:
    extremes = whole(segments)
    found = {(row, role): values for row, role, values in by_key(Stretches.of(segments).whole())}
    for row in range(segments.conversations):
        for role in Role:
            part = slice(role * DIRECTIONS, (role + 1) * DIRECTIONS)
            high, low = extremes.high[row, part].tolist(), extremes.low[row, part].tolist()
            if ABSENT in high:
                assert (row, role) not in found
            else:
                assert found[row, role] == high + [-value for value in low]


@given(Conversations, st.data())
def test_stretches_of_chosen_conversations_keep_their_rows(
    segments: Segments, data: st.DataObject
) -> None:
    count = segments.conversations
    chosen = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    apart = Stretches.of(segments)
    found = apart.of_conversations(np.array(chosen, np.bool_))
    assert found.conversations == count
    assert by_key(found) == [each for each in by_key(apart) if chosen[each[0]]]


@given(Conversations)
def test_a_role_is_present_where_it_has_a_stretch(segments: Segments) -> None:
    stretches = Stretches.of(segments)
    keys = grouped(stretches)
    expected = [[(row, role) in keys for role in Role] for row in range(segments.conversations)]
    for each in (stretches, stretches.whole()):
        present = each.present()
        assert present.shape == (segments.conversations, 2)
        assert present.tolist() == expected


def test_numbers_of_roles_are_spread_over_their_series() -> None:
    spread = per_series(np.array([7, 9]), DIRECTIONS)
    expected = [(7, 9)[series_at(i, DIRECTIONS).role] for i in range(4 * DIRECTIONS)]
    assert spread.tolist() == expected
