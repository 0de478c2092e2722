"""Ranges of any conversations, against what a walk over them counts in plain Python."""

from collections import Counter, defaultdict
from functools import reduce
from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np
from extremes import segments_from
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.records import ABSENT
from transforms.ranges.counts import Counts
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import Stretches

DIRECTIONS = 2
LIMIT = 32767
EMPTY = Ranges.empty(DIRECTIONS, "d" * 64, "a-model")
STARTS = [*range(-32768, -4096, 512), *range(-4096, 32768, 32)]
"""The lowest value of every bin."""


class Conversation(NamedTuple):
    """Role, lowest and highest values of every segment; score, length and limit of every role."""

    segments: list[tuple[int, list[int], list[int]]]
    scores: list[tuple[int, int, int]]


NUMBER = (
    st.integers(-LIMIT, LIMIT)
    | st.integers(1900, 2100)
    | st.sampled_from([-LIMIT, -4097, -4096, -1, 0, 31, 32, LIMIT])
)
VECTOR = st.lists(NUMBER, min_size=DIRECTIONS, max_size=DIRECTIONS)
SCORE = st.integers(0, 40_000) | st.just(ABSENT)
CONVERSATION = st.builds(
    Conversation,
    st.lists(st.tuples(st.integers(0, 1), VECTOR, VECTOR), max_size=4),
    st.lists(st.tuples(SCORE, st.integers(0, 11), SCORE), min_size=2, max_size=2),
)
CONVERSATIONS = st.lists(CONVERSATION, max_size=8)


def counted(conversations: list[Conversation], before: Ranges = EMPTY) -> Ranges:
    """Ranges with conversations counted, all in one pack."""
    segments = segments_from([each.segments for each in conversations], DIRECTIONS)
    columns = np.array([each.scores for each in conversations], np.int64).reshape(-1, 2, 3)
    scores, lengths, limits = columns.transpose(2, 0, 1)
    held = np.where(scores == ABSENT, ABSENT, limits).astype(np.int32)
    ranges = before.plus(Stretches.of(segments))
    ranges = ranges.plus_scores(scores.astype(np.int32), lengths, scores == ABSENT, held)
    return ranges.plus_verdicts(len(conversations), len(conversations) // 3)


def in_packs(conversations: list[Conversation], random: Random) -> Ranges:
    """Counted in any packs of several processes, some looked at in between, merged in any order."""
    cuts = [0, *sorted(random.choices(range(len(conversations) + 1), k=4)), len(conversations)]
    packs = [conversations[begin:end] for begin, end in pairwise(cuts)]
    parts = [EMPTY] * 2
    for pack in packs:
        chosen = random.randrange(len(parts))
        parts[chosen] = counted(pack, parts[chosen])
        if random.random() < 0.3:
            assert parts[chosen].hash
    if random.random() < 0.5:
        parts = [Ranges.from_bytes(part.to_bytes()) for part in parts]
    return reduce(close, random.sample(parts, len(parts)))


def walked(conversations: list[Conversation], whole: bool) -> dict[int, list[int]]:
    """The values of every series, of segments or of whole conversations."""
    found = defaultdict(list)
    for conversation in conversations:
        mine = defaultdict(list)
        for role, low, high in conversation.segments:
            for direction in range(DIRECTIONS):
                mine[role * DIRECTIONS + direction].append(high[direction])
                mine[(2 + role) * DIRECTIONS + direction].append(-low[direction])
        for series, values in mine.items():
            found[series] += [max(values)] if whole else values
    return found


def counts_and_values(
    conversations: list[Conversation],
) -> list[tuple[Counts, dict[int, list[int]]]]:
    """Of segments and of whole conversations: what was counted and what was there."""
    ranges = counted(conversations)
    return [
        (ranges.segments, walked(conversations, whole=False)),
        (ranges.conversations, walked(conversations, whole=True)),
    ]


def start_of(value: int) -> int:
    """The lowest value of a value's bin."""
    width = 512 if value < -4096 else 32
    return value // width * width


@settings(max_examples=50, deadline=None)
@given(CONVERSATIONS)
def test_every_value_is_counted_in_its_bin(conversations: list[Conversation]) -> None:
    for counts, values in counts_and_values(conversations):
        assert counts.total == sum(bool(each.segments) for each in conversations)
        for series in range(4 * DIRECTIONS):
            expected = Counter(map(start_of, values[series]))
            numbers = counts.histogram[series].tolist()
            assert {start: n for start, n in zip(STARTS, numbers, strict=True) if n} == expected
            assert counts.maximum[series] == max(values[series], default=ABSENT)


@settings(max_examples=50, deadline=None)
@given(st.lists(CONVERSATION, min_size=1, max_size=20), st.sampled_from([0, 0.3, 0.9, 0.99, 1]))
def test_quantiles_are_as_near_to_numpys_as_promised(
    conversations: list[Conversation], q: float
) -> None:
    for counts, values in counts_and_values(conversations):
        estimates = counts.quantile(q).tolist()
        for series in range(4 * DIRECTIONS):
            if column := values[series]:
                exact = float(np.quantile(column, q))
                around = (
                    max(each for each in column if each <= exact),
                    min(each for each in column if each >= exact),
                )
                allowed = max(512 if each < -4096 else 32 for each in around)
                assert abs(estimates[series] - exact) <= allowed
            else:
                assert estimates[series] == 0


@settings(max_examples=50, deadline=None)
@given(CONVERSATIONS, CONVERSATIONS, CONVERSATIONS)
def test_merging_is_associative_and_commutative(
    a: list[Conversation], b: list[Conversation], c: list[Conversation]
) -> None:
    x, y, z = map(counted, (a, b, c))
    assert x.merged(y).merged(z).to_bytes() == x.merged(y.merged(z)).to_bytes()
    assert x.merged(y).to_bytes() == y.merged(x).to_bytes()
    assert x.merged(x.emptied()).to_bytes() == x.to_bytes() == EMPTY.merged(x).to_bytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(CONVERSATION, max_size=20), st.randoms(use_true_random=False))
def test_order_packs_and_processes_make_no_difference(
    conversations: list[Conversation], random: Random
) -> None:
    shuffled = random.sample(conversations, len(conversations))
    found, expected = in_packs(shuffled, random), counted(conversations)
    for name in ("segments", "conversations", "scores"):
        mine, theirs = getattr(found, name).to_arrays(), getattr(expected, name).to_arrays()
        assert all(mine[each].tobytes() == theirs[each].tobytes() for each in theirs), name
    assert found.judged == expected.judged


@settings(max_examples=50, deadline=None)
@given(CONVERSATIONS)
def test_what_is_stored_is_what_was_counted(conversations: list[Conversation]) -> None:
    ranges = counted(conversations)
    again = Ranges.from_bytes(ranges.to_bytes())
    assert again.to_bytes() == ranges.to_bytes()
    assert again.hash == ranges.hash
    for name in ("segments", "conversations"):
        mine, theirs = getattr(again, name), getattr(ranges, name)
        assert mine.total == theirs.total
        for each in ("stretches", "maximum", "histogram"):
            assert getattr(mine, each).dtype == getattr(theirs, each).dtype
            assert np.array_equal(getattr(mine, each), getattr(theirs, each))
    # Steps come back as the very integers they were.
    values = walked(conversations, whole=True)
    maximum = [max(values[series], default=ABSENT) for series in range(4 * DIRECTIONS)]
    assert again.conversations.maximum.tolist() == maximum
