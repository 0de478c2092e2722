"""Segments taken, joined and made of nothing, against lists of one conversation after another."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.records import STEPS_PER_UNIT, Segments

DIRECTIONS = 2

DTYPES = {
    "row": np.int32,
    "role": np.int8,
    "start": np.uint32,
    "tokens": np.uint8,
    "low": np.int16,
    "high": np.int16,
    "low_at": np.uint8,
    "high_at": np.uint8,
}
VECTORS = ("low", "high", "low_at", "high_at")

Conversation = list[tuple[Any, ...]]
"""Of every segment what all arrays but `row` say, in the order of the arrays."""


def vectors(smallest: int, largest: int) -> st.SearchStrategy[list[int]]:
    numbers = st.integers(smallest, largest)
    return st.lists(numbers, min_size=DIRECTIONS, max_size=DIRECTIONS)


STEPS, PLACES = vectors(-STEPS_PER_UNIT, STEPS_PER_UNIT), vectors(0, 63)
ROWS: st.SearchStrategy[list[Conversation]] = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(0, 2**32 - 1),
            st.integers(1, 64),
            STEPS,
            STEPS,
            PLACES,
            PLACES,
        ),
        max_size=3,
    ),
    max_size=5,
)


def made_of(rows: list[Conversation]) -> Segments:
    """The arrays for conversations."""
    flat = [(row, *segment) for row, conversation in enumerate(rows) for segment in conversation]
    columns = {
        name: np.array([each[place] for each in flat], dtype)
        for place, (name, dtype) in enumerate(DTYPES.items())
    }
    for name in VECTORS:
        columns[name] = columns[name].reshape(len(flat), DIRECTIONS)
    return Segments(len(rows), **columns)


def conversations(segments: Segments) -> list[Conversation]:
    """Read arrays as conversations, and make sure that they are as documented."""
    assert [field.name for field in fields(segments)] == ["conversations", *DTYPES]
    for name, dtype in DTYPES.items():
        array = getattr(segments, name)
        assert array.dtype == dtype, name
        assert array.shape == (len(segments.row), DIRECTIONS)[: 1 + (name in VECTORS)]
    found: list[Conversation] = [[] for _ in range(segments.conversations)]
    names = list(DTYPES)
    columns = [getattr(segments, name).tolist() for name in names]
    for row, *rest in zip(*columns, strict=True):
        found[row].append(tuple(rest))
    assert columns[0] == sorted(columns[0])
    return found


@given(ROWS, st.data())
def test_conversations_are_taken_in_the_given_order(
    rows: list[Conversation], data: st.DataObject
) -> None:
    wanted = data.draw(
        st.lists(st.sampled_from(range(len(rows))), unique=True) if rows else st.just([])
    )
    expected = [rows[row] for row in wanted]
    assert conversations(made_of(rows).take(wanted)) == expected
    assert conversations(made_of(rows).take(np.array(wanted, np.int64))) == expected


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_conversations_of_one_come_after_those_of_the_other(
    parts: list[list[Conversation]],
) -> None:
    joined = Segments.joined([made_of(rows) for rows in parts])
    assert conversations(joined) == [row for rows in parts for row in rows]


@given(ROWS, ROWS)
def test_what_was_joined_can_be_taken_apart(
    first: list[Conversation], second: list[Conversation]
) -> None:
    joined = Segments.joined([made_of(first), made_of(second)])
    places = range(joined.conversations)
    assert conversations(joined.take(places[len(first) :])) == second
    assert conversations(joined.take(places[::-1])) == [*first, *second][::-1]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_conversations_without_tokens_have_no_segments(count: int) -> None:
    none = Segments.none(count, DIRECTIONS)
    assert conversations(none) == [[]] * count
    assert conversations(none.take(range(count))) == [[]] * count
