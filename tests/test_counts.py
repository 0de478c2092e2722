"""Counts against numpy on the raw values, then split, merged and compared."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from schemas.records import ABSENT
from transforms.ranges.counts import Counts
from transforms.ranges.series import per_series

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
    """Values [n, 4 * directions] of one distribution; a fifth of conversations lack a role."""
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


def allowed_error(column: np.ndarray, exact: float) -> int:
    """The promised bound: the width of the wider bin around the quantile."""
    neighbours = column[column <= exact].max(), column[column >= exact].min()
    return max(32 if value >= -4096 else 512 for value in neighbours)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 101, 3000])
def test_quantiles_over_all_conversations_keep_their_promise(name: str, n: int) -> None:
    values = drawn(name, n)
    counts = Counts.empty(2).plus(values)
    total = int((values != ABSENT).any(axis=1).sum())
    assert counts.total == total
    for q in (0.5, 0.9, 0.99, 0.999, 1.0):
        estimates = counts.quantile(q)
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
    bounds = Counts.empty(1).plus(values).quantile(0.9)
    # Over all conversations the 90th percentile lies below all 50; of the 50, 80% is rank 39.2.
    assert abs(int(bounds[1]) - 3920) <= 32


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_maximum_and_numbers_are_exact(name: str) -> None:
    values = drawn(name, 500)
    counts = Counts.empty(2).plus(values)
    expected = [present(values, series).max() for series in range(values.shape[1])]
    assert counts.maximum.tolist() == expected
    assert counts.quantile(1.0).tolist() == expected
    sizes = [len(present(values, series)) for series in range(values.shape[1])]
    assert per_series(counts.conversations, 2).tolist() == sizes


def test_more_rows_than_are_counted_at_once() -> None:
    values = drawn("normal", 2500)
    one_by_one = Counts.empty(2)
    for start in range(0, 2500, 7):
        one_by_one = one_by_one.plus(values[start : start + 7])
    assert same(one_by_one, Counts.empty(2).plus(values))


def test_a_role_that_never_spoke_has_no_range() -> None:
    values = drawn("normal", 50)
    values[:, [2, 3, 6, 7]] = ABSENT
    counts = Counts.empty(2).plus(values)
    assert counts.conversations[1] == 0
    assert (counts.maximum[[2, 3, 6, 7]] == ABSENT).all()
    assert (counts.quantile(0.9)[[2, 3, 6, 7]] == 0).all()


def test_int16_and_int32_values_count_alike() -> None:
    values = drawn("uniform", 100)
    narrow = Counts.empty(2).plus(values.astype(np.int16))
    assert same(narrow, Counts.empty(2).plus(values))


def test_counts_beyond_32_bits_stay_exact() -> None:
    counts = Counts.empty(2).plus(drawn("normal", 3))
    doubled = counts
    for _ in range(40):
        doubled = doubled.merged(doubled)
    assert doubled.conversations[0] == int(counts.conversations[0]) << 40
    assert same(Counts.from_arrays(doubled.to_arrays()), doubled)


def test_what_is_stored_holds_only_bins_in_use() -> None:
    arrays = Counts.empty(432).plus(drawn("normal", 200, directions=432)).to_arrays()
    assert sum(array.nbytes for array in arrays.values()) < 1_000_000
    assert arrays["counts"].dtype == np.uint8


def test_counts_cannot_be_changed_from_outside() -> None:
    counts = Counts.empty(2).plus(drawn("normal", 5))
    for array in (counts.maximum, counts.histogram, counts.conversations):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_other_numbers_of_series_are_refused() -> None:
    with pytest.raises(ValueError, match="series"):
        Counts.empty(3).plus(drawn("normal", 5))
    with pytest.raises(ValueError, match="3 and of 2 directions"):
        Counts.empty(3).merged(Counts.empty(2))


@pytest.mark.parametrize("name", ["counts", "conversations", "indptr", "maximum", "total"])
def test_damaged_arrays_are_refused(name: str) -> None:
    arrays = Counts.empty(2).plus(drawn("normal", 5)).to_arrays()
    damaged = arrays[name].copy()
    damaged[-1] += -1 if name == "total" else 1
    if name == "maximum":
        damaged = damaged[:-1]
    with pytest.raises(ValueError, match=r"fit together|add up|shape"):
        Counts.from_arrays({**arrays, name: damaged})


def conversations() -> st.SearchStrategy[np.ndarray]:
    """Up to five conversations over one direction, any role absent."""
    number = st.integers(-LIMIT, LIMIT)
    roles = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=0, max_size=5)
    return roles.flatmap(
        lambda there: arrays(np.int32, (len(there), 4), elements=number).map(
            lambda values: np.where(
                np.array(there, bool).reshape(-1, 2)[:, [0, 1] * 2], values, ABSENT
            )
        )
    )


def same(one: Counts, other: Counts) -> bool:
    """Whether two counts are equal in every array, types included."""
    mine, theirs = one.to_arrays(), other.to_arrays()
    return all(
        mine[name].dtype == theirs[name].dtype and np.array_equal(mine[name], theirs[name])
        for name in mine
    )


@settings(max_examples=40, deadline=None)
@given(conversations(), conversations(), conversations(), st.randoms(use_true_random=False))
def test_merging_is_a_commutative_monoid(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, random: np.random.Generator
) -> None:
    empty = Counts.empty(1)
    x, y, z = (empty.plus(values) for values in (a, b, c))
    assert same(x.merged(y).merged(z), x.merged(y.merged(z)))
    assert same(x.merged(y), y.merged(x))
    assert same(x.merged(empty), x)
    rows = list(np.concatenate([a, b, c]))
    random.shuffle(rows)
    shuffled = np.array(rows, np.int32).reshape(-1, 4)
    assert same(empty.plus(shuffled), x.merged(y).merged(z))


@settings(max_examples=40, deadline=None)
@given(conversations())
def test_arrays_read_back_as_the_same_counts(values: np.ndarray) -> None:
    counts = Counts.empty(1).plus(values)
    again = Counts.from_arrays(counts.to_arrays())
    assert same(again, counts)
    for q in (0.0, 0.3, 0.9, 1.0):
        assert again.quantile(q).tolist() == counts.quantile(q).tolist()
