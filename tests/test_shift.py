"""When traffic is said to have shifted, against sums made otherwise and by chance."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schemas.commit import Shift
from transforms.ranges.shift import FAR, LIMIT, MOST, after_epoch

RATE = 0.01


def told(days: list[tuple[int, int]]) -> list[int]:
    """Epochs in which a shift was raised."""
    shift, found = Shift(), []
    for epoch, (judged, flagged) in enumerate(days):
        shift = after_epoch(shift, epoch, judged, flagged, RATE)
        found += [epoch] if shift.raised == epoch else []
    return found


DAYS = st.lists(st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))


@given(DAYS)
def test_the_sum_is_pages_recursion(days: list[tuple[int, int]]) -> None:
    expected, total, told_of = [], Fraction(0), False
    for epoch, (judged, flagged) in enumerate(days):
        total = max(total + flagged - FAR * judged * Fraction(1, 100), Fraction(0))
        total = min(total, Fraction(MOST))
        told_of = told_of and total > 0
        if total >= LIMIT and not told_of:
            expected.append(epoch)
            told_of = True
    assert told(days) == expected


def test_chance_alone_raises_none_and_a_new_product_does_within_some_hundred() -> None:
    rng = np.random.default_rng(0)
    for rate in (RATE, 2 * RATE):
        assert not told([(300, int(n)) for n in rng.binomial(300, rate, 20_000)])
    shifted = [(50, int(n)) for n in rng.binomial(50, 0.1, 100)]
    assert 3 <= told(shifted)[0] <= 12
    assert len(told(shifted)) == 1, "said once while it lasts"
    assert told([*shifted, *[(300, 3)] * 200, *shifted])[1] >= 300, "and again after it was over"


def test_a_long_shift_is_over_soon_after_its_last_epoch() -> None:
    long = [(5000, 1000)] * 10
    assert told([*long, *[(300, 3)] * 10, *long]) == [0, 20]


def test_one_burst_among_normal_traffic_is_none() -> None:
    assert not told([(1000, 10), (1000, 30), (1000, 40), (1000, 10)])
