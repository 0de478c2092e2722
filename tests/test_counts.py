"""Counts against numpy on the raw values, then split, merged and compared."""

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from extremes import stretches_from
from former_counts import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.records import ABSENT, Role
from transforms.ranges.counts import HELD, Counts
from transforms.ranges.series import Stretches, per_series

LIMIT = 32767
Draw = Callable[[np.random.Generator, int], np.ndarray]

DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(2500, 500, n),
    "negative": lambda rng, n: rng.normal(-9000, 3000, n),
    "around_the_change_of_width": lambda rng, n: rng.normal(-4096, 300, n),
    "exponential": lambda rng, n: rng.exponential(900, n),
    "heavy_tail": lambda rng, n: 100 * rng.standard_t(1.5, n),
    "uniform": lambda rng, n: rng.uniform(-LIMIT, LIMIT, n),
    "narrow": lambda rng, n: rng.integers(700, 704, n).astype(float),
    "constant": lambda rng, n: np.full(n, 1234.0),
    "two_points": lambda rng, n: rng.choice([-30000.0, 30000.0], n),
    "at_the_ends": lambda rng, n: rng.choice([-LIMIT, LIMIT], n).astype(float),
}


def drawn(name: str, n: int, directions: int = 2, seed: int = 0) -> np.ndarray:
    """Values [n, 4 * directions] of one distribution; a fifth of conversations lack a role.

    Of whole conversations, in all series.
    """
    rng = np.random.default_rng(seed)
    raw = [DISTRIBUTIONS[name](rng, n) for _ in range(4 * directions)]
    values = np.clip(np.rint(np.stack(raw, axis=1)), -LIMIT, LIMIT).astype(np.int32)
    absent = rng.random((n, 2)) < 0.2
    absent[0] = False
    return np.where(np.repeat(np.tile(absent, 2), directions, axis=1), ABSENT, values)


def present(values: np.ndarray, series: int) -> np.ndarray:
    """The values of one series, without the conversations that lack its role."""
    column = values[:, series]
    return column[column != ABSENT]


def counted(values: np.ndarray) -> Counts:
    """Counts of whole conversations."""
    return Counts.empty(values.shape[1] // 4).plus(stretches_from(values))


def allowed_error(column: np.ndarray, exact: float) -> int:
    """The promised bound: the width of the wider bin around the quantile."""
    neighbours = column[column <= exact].max(), column[column >= exact].min()
    return max(32 if value >= -4096 else 512 for value in neighbours)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 3000])
def test_quantiles_keep_their_promise(name: str, n: int) -> None:
    values = drawn(name, n)
    counts = counted(values)
    for q in (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        estimates = counts.quantile(q)
        assert estimates.dtype == np.int32
        for series in range(values.shape[1]):
            column = present(values, series)
            exact = float(np.quantile(column, q))
            error = abs(int(estimates[series]) - exact)
            assert error <= allowed_error(column, exact), (q, series)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 3000])
def test_quantiles_over_all_conversations_keep_their_promise(name: str, n: int) -> None:
    values = drawn(name, n)
    counts = counted(values)
    total = int((values != ABSENT).any(axis=1).sum())
    assert counts.total == total
    for q in (0.5, 0.9, 0.99, 0.999, 1.0):
        estimates = counts.quantile_of_all(q)
        for series in range(values.shape[1]):
            column = present(values, series)
            # Those without the role, put below all values; where even the quantile falls among
            # them, the lowest value stands for it.
            below = np.full(total - len(column), column.min())
            exact = float(np.quantile(np.concatenate([below, column]), q))
            exact = max(exact, float(np.quantile(column, 1 - 2 * (1 - q))))
            error = abs(int(estimates[series]) - exact)
            assert error <= allowed_error(column, exact), (q, series)


def test_a_rare_role_keeps_to_its_own_tail() -> None:
    values = np.full((1000, 4), 1000, np.int32)
    values[:, [1, 3]] = ABSENT
    values[:50, [1, 3]] = np.arange(50)[:, None] * 100
    counts = counted(values)
    # Over all conversations the 90th percentile lies below all 50; of the 50, 80% is rank 39.2.
    assert abs(int(counts.quantile_of_all(0.9)[1]) - 3920) <= 32
    # Among its own, conversations without it do not matter: rank 44.1.
    assert abs(int(counts.quantile(0.9)[1]) - 4410) <= 32


def test_a_conversation_may_have_any_number_of_stretches_of_a_role() -> None:
    rng = np.random.default_rng(0)
    row = np.sort(rng.integers(0, 300, 1500)).astype(np.int32)
    row = row[row % 10 != 3]  # every tenth has no tokens at all
    role = (rng.random(len(row)) < 0.3).astype(np.int8)
    values = rng.normal(2500, 500, (len(row), 4)).astype(np.int16)
    counts = Counts.empty(2).plus(Stretches(300, row, role, values))
    assert counts.total == len(set(row.tolist())) < 300
    for each in Role:
        mine = values[role == each]
        assert counts.stretches[each] == len(mine)
        # High, then low; of either its own directions.
        series = [2 * each, 2 * each + 1, 4 + 2 * each, 5 + 2 * each]
        assert counts.histogram[series].sum(axis=1).tolist() == [len(mine)] * 4
        assert counts.maximum[series].tolist() == mine.max(axis=0).tolist()
        for q in (0.1, 0.5, 0.99):
            exact = np.quantile(mine, q, axis=0)
            assert np.abs(counts.quantile(q)[series] - exact).max() <= 32


def test_conversations_without_stretches_are_not_counted() -> None:
    nobody = Stretches(5, np.empty(0, np.int32), np.empty(0, np.int8), np.empty((0, 4), np.int16))
    counts = Counts.empty(2).plus(nobody)
    assert same(counts, Counts.empty(2))
    assert counts.total == 0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_maximum_and_numbers_are_exact(name: str) -> None:
    values = drawn(name, 500)
    counts = counted(values)
    expected = [present(values, series).max() for series in range(values.shape[1])]
    assert counts.maximum.tolist() == expected
    assert counts.quantile(1.0).tolist() == expected
    assert counts.quantile_of_all(1.0).tolist() == expected
    sizes = [len(present(values, series)) for series in range(values.shape[1])]
    assert per_series(counts.stretches, 2).tolist() == sizes


def test_it_does_not_matter_when_stretches_are_tallied() -> None:
    values = drawn("normal", 2 * HELD)
    looked_at = one_by_one = Counts.empty(2)
    for start in range(0, len(values), 97):
        few = stretches_from(values[start : start + 97])
        one_by_one, looked_at = one_by_one.plus(few), looked_at.plus(few)
        looked_at.quantile(0.9)
    assert same(one_by_one, counted(values))
    assert same(looked_at, counted(values))


def test_counts_stay_as_they_were_when_more_is_added() -> None:
    few, more = stretches_from(drawn("normal", 5)), stretches_from(drawn("uniform", HELD))
    counts = Counts.empty(2).plus(few)
    before = counts.to_arrays()
    counts.plus(few)
    counts.plus(more)
    counts.merged(counts.plus(more))
    few.values[:] = 0
    assert all(np.array_equal(before[name], array) for name, array in counts.to_arrays().items())


def test_a_role_that_never_spoke_has_no_range() -> None:
    values = drawn("normal", 50)
    values[:, [2, 3, 6, 7]] = ABSENT
    counts = counted(values)
    assert counts.stretches.tolist() == [len(present(values, 0)), 0]
    assert (counts.maximum[[2, 3, 6, 7]] == ABSENT).all()
    for quantiles in (counts.quantile(0.9), counts.quantile_of_all(0.9)):
        assert (quantiles[[2, 3, 6, 7]] == 0).all()
        assert (quantiles[[0, 1, 4, 5]] > 0).all()


def test_counts_beyond_32_bits_stay_exact() -> None:
    doubled = counts = counted(drawn("normal", 3))
    for _ in range(40):
        doubled = doubled.merged(doubled)
    assert doubled.stretches[0] == int(counts.stretches[0]) << 40
    assert doubled.total == counts.total << 40
    assert same(Counts.from_arrays(doubled.to_arrays()), doubled)


def test_what_is_stored_holds_only_bins_in_use() -> None:
    counts = counted(drawn("normal", 200, directions=432))
    arrays = counts.to_arrays()
    used = int((counts.histogram > 0).sum())
    # A byte for almost every one, and five for a series: its first bin, how many, the maximum.
    assert arrays["counts"].nbytes + arrays["gaps"].nbytes < 1.3 * used + 2 * 1728
    assert arrays["used"].nbytes + arrays["maximum"].nbytes == 4 * 1728


def test_arrays_are_those_that_are_documented() -> None:
    values = np.full((303, 4), ABSENT, np.int32)
    # High of the user: 300 values in one bin, one in the next, one five bins farther up.
    values[:302, 0] = [64] * 300 + [96, 256]
    # Low negated: in the first bin of all, and in the last.
    values[:302, 2] = [-LIMIT] * 301 + [LIMIT]
    arrays = counted(values).to_arrays()
    fine_from, last = 56 + 4096 // 32, 1207
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "used": [3, 0, 2, 0],
        "counts": [
            *(600 + 1 - 512 + 128, 512 >> 7),
            2,
            2 + 1,
            *((602 & 127) + 128, 602 >> 7),
            2 + 1,
        ],
        "gaps": [
            *((fine_from + 2 & 127) + 128, fine_from + 2 >> 7),
            4,
            *((last - 1 & 127) + 128, last - 1 >> 7),
        ],
        "maximum": [256, ABSENT, LIMIT, ABSENT],
        "stretches": [302, 0],
        "total": [302],
    }
    kinds = (np.uint16, np.uint8, np.uint8, np.int16, np.int64, np.int64)
    assert tuple(array.dtype for array in arrays.values()) == kinds


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [0, 1, 500])
def test_the_arrays_of_before_can_be_read(name: str, n: int) -> None:
    counts = counted(drawn(name, n)) if n else Counts.empty(2)
    assert same(Counts.from_arrays(rows_of(counts)), counts)


def test_damaged_arrays_of_before_are_refused() -> None:
    rows = rows_of(counted(drawn("normal", 50)))
    refused(rows, counts=rows["counts"] + 1)
    refused(rows, counts=rows["counts"][1:])
    refused(rows, bins=rows["bins"][::-1])
    refused(rows, bins=rows["bins"] + 1000)
    refused(rows, indptr=rows["indptr"][::-1])


def test_counts_cannot_be_changed_from_outside() -> None:
    counts = counted(drawn("normal", 5))
    histograms = counts.histograms
    for array in (counts.maximum, counts.stretches, histograms.places, histograms.numbers):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    counts.histogram[:] = 0
    assert counts.histogram.sum() == 4 * counts.stretches.sum()


def test_other_numbers_of_series_are_refused() -> None:
    with pytest.raises(ValueError, match="4 series a role, expected 6"):
        Counts.empty(3).plus(stretches_from(drawn("normal", 5)))
    with pytest.raises(ValueError, match="3 and of 2 directions"):
        Counts.empty(3).merged(Counts.empty(2))


def refused(arrays: dict[str, np.ndarray], **changed: np.ndarray) -> None:
    """Reading arrays fails once some of them are changed."""
    with pytest.raises(ValueError, match=r"fit together|add up|no numbers"):
        Counts.from_arrays({**arrays, **changed})


@pytest.mark.parametrize("name", ["counts", "gaps", "used", "maximum", "stretches"])
def test_arrays_with_something_missing_or_something_more_are_refused(name: str) -> None:
    arrays = counted(drawn("normal", 300)).to_arrays()
    refused(arrays, **{name: arrays[name][:-1]})
    refused(arrays, **{name: np.append(arrays[name], arrays[name][-1:])})


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    arrays = counted(drawn("normal", 300)).to_arrays()
    counts, gaps, used = arrays["counts"], arrays["gaps"], arrays["used"].astype(np.int64)
    one = np.eye(len(used), dtype=np.int64)
    refused(arrays, used=used + one[0])
    refused(arrays, used=used - one[0] + one[1])  # a bin of one series given to another
    refused(arrays, stretches=arrays["stretches"] + 1)
    refused(arrays, total=arrays["stretches"].sum(keepdims=True) + 1)
    for place in np.flatnonzero(counts < 100)[:5]:
        change = np.zeros_like(counts)
        change[place] = 1
        refused(arrays, counts=counts ^ change)  # a gap too many or too few
        refused(arrays, counts=counts + 2 * change)  # a value too many
    far = gaps.copy()
    far[1] = 127  # the first gap takes two bytes: now it is of 16,000 bins
    refused(arrays, gaps=far)
    refused(arrays, counts=np.full(len(counts), 255, np.uint8))


Number = st.integers(-LIMIT, LIMIT)
Conversation = list[tuple[int, tuple[int, int]]]
"""Over one direction: role, high and low negated of every stretch."""

CONVERSATIONS: st.SearchStrategy[list[Conversation]] = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.tuples(Number, Number)), max_size=3), max_size=5
)


def stretches_of(conversations: list[Conversation]) -> Stretches:
    """The arrays for them."""
    flat = [(row, *each) for row, stretches in enumerate(conversations) for each in stretches]
    return Stretches(
        len(conversations),
        np.array([row for row, _, _ in flat], np.int32),
        np.array([role for _, role, _ in flat], np.int8),
        np.array([values for _, _, values in flat], np.int16).reshape(-1, 2),
    )


def same(one: Counts, other: Counts) -> bool:
    """Whether two counts are equal in every array, types included."""
    mine, theirs = one.to_arrays(), other.to_arrays()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and np.array_equal(mine[name], theirs[name])
        for name in mine
    )


@given(CONVERSATIONS)
def test_counts_are_those_of_a_walk_over_all_stretches(conversations: list[Conversation]) -> None:
    counts = Counts.empty(1).plus(stretches_of(conversations))
    assert counts.total == sum(map(bool, conversations))
    # High of the user, of the assistant; then low of both.
    for series, (role, side) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        column = [
            values[side] for stretches in conversations for of, values in stretches if of == role
        ]
        assert counts.stretches[role] == counts.histogram[series].sum() == len(column)
        assert counts.maximum[series] == max(column, default=ABSENT)


@settings(max_examples=40, deadline=None)
@given(CONVERSATIONS, CONVERSATIONS, CONVERSATIONS, st.randoms(use_true_random=False))
def test_merging_is_a_commutative_monoid(
    a: list[Conversation], b: list[Conversation], c: list[Conversation], random: Random
) -> None:
    empty = Counts.empty(1)
    x, y, z = (empty.plus(stretches_of(each)) for each in (a, b, c))
    assert same(x.merged(y).merged(z), x.merged(y.merged(z)))
    assert same(x.merged(y), y.merged(x))
    assert same(x.merged(empty), x)
    shuffled = [*a, *b, *c]
    random.shuffle(shuffled)
    assert same(empty.plus(stretches_of(shuffled)), x.merged(y).merged(z))


@settings(max_examples=40, deadline=None)
@given(CONVERSATIONS)
def test_arrays_read_back_as_the_same_counts(conversations: list[Conversation]) -> None:
    counts = Counts.empty(1).plus(stretches_of(conversations))
    again = Counts.from_arrays(counts.to_arrays())
    assert same(again, counts)
    for q in (0.0, 0.3, 0.9, 1.0):
        assert again.quantile(q).tolist() == counts.quantile(q).tolist()
        assert again.quantile_of_all(q).tolist() == counts.quantile_of_all(q).tolist()
