"""Score counts and conformal thresholds against sorted lists of the raw scores."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.records import ABSENT, Role
from transforms.ranges.scores import BIN_WIDTH, ScoreCounts

HALF_PERCENT = Fraction("0.005")
PERCENT = Fraction("0.01")


def counted(user: list[int], assistant: list[int] | None = None) -> ScoreCounts:
    """Counts of conversations that all have a user; those beyond `assistant` have no assistant."""
    missing = len(user) - len(assistant or [])
    scores = np.array([user, (assistant or []) + [ABSENT] * missing], np.int32).T
    return ScoreCounts.empty().plus(scores, scores == ABSENT)


def same(one: ScoreCounts, other: ScoreCounts) -> bool:
    """Whether two counts are equal in every array."""
    mine, theirs = one.to_arrays(), other.to_arrays()
    return all(np.array_equal(mine[name], theirs[name]) for name in mine)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-90_000, 400_000), min_size=1, max_size=60),
    st.fractions(Fraction(1, 100), Fraction(9, 10)),
)
def test_threshold_is_the_upper_end_of_the_order_statistic(
    scores: list[int], rate: Fraction
) -> None:
    threshold = counted(scores).conformal_threshold(Role.USER, rate, rate)
    k = math.ceil((len(scores) + 1) * (1 - rate))
    if k > len(scores):
        assert threshold is None
    else:
        exact = sorted(scores)[k - 1]
        assert threshold is not None
        assert exact <= threshold < exact + BIN_WIDTH


def test_as_many_scores_as_the_rate_needs() -> None:
    assert counted(list(range(198))).conformal_threshold(Role.USER, HALF_PERCENT, PERCENT) is None
    enough = counted(list(range(199))).conformal_threshold(Role.USER, HALF_PERCENT, PERCENT)
    assert enough is not None
    assert enough >= 198


def test_no_scores_no_threshold() -> None:
    rate = Fraction(1, 2)
    assert ScoreCounts.empty().conformal_threshold(Role.USER, rate, rate) is None


def test_conversations_without_the_role_stand_below_all_scores() -> None:
    counts = counted(list(range(0, 8000, 8)), list(range(0, 6400, 8)))
    assert counts.n == (1000, 800)
    # The fifth largest of 1,000 either way: k = ceil(1001 * 0.995) = 996.
    assert counts.conformal_threshold(Role.USER, HALF_PERCENT, PERCENT) == 995 * 8 + 7
    assert counts.conformal_threshold(Role.ASSISTANT, HALF_PERCENT, PERCENT) == 795 * 8 + 7


def test_a_rare_role_is_not_flagged_at_every_appearance() -> None:
    rare = counted([0] * 10_000, list(range(0, 8 * 150, 8)))
    threshold = rare.conformal_threshold(Role.ASSISTANT, Fraction("0.02"), Fraction("0.04"))
    # 150 of 10,000 are fewer than 2%; its own 4% leave ceil(151 * 0.96) = 145 below.
    assert threshold == 144 * 8 + 7


@pytest.mark.parametrize("present", [1.0, 0.7])
def test_new_conversations_exceed_at_most_at_the_asked_rate(present: float) -> None:
    rng = np.random.default_rng(4)
    rate, n, rounds = Fraction("0.05"), 59, 3000
    flagged = 0
    for _ in range(rounds):
        scores = np.rint(rng.standard_cauchy((n + 1, 2)) * 500).clip(-90_000, 400_000)
        scores = np.where(rng.random((n + 1, 2)) < present, scores, ABSENT).astype(np.int32)
        counts = ScoreCounts.empty().plus(scores[:n], scores[:n] == ABSENT)
        threshold = counts.conformal_threshold(Role.USER, rate, 2 * rate)
        assert threshold is not None
        flagged += bool(scores[n, Role.USER] > threshold)
    spread = 3 * math.sqrt(float(rate) / rounds)
    assert flagged / rounds <= float(rate) + spread


score_lists = st.lists(
    st.tuples(st.integers(-90_000, 400_000), st.integers(-90_000, 400_000) | st.just(ABSENT)),
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(score_lists, score_lists, score_lists)
def test_merging_is_a_commutative_monoid_and_arrays_read_back(
    a: list[tuple[int, int]], b: list[tuple[int, int]], c: list[tuple[int, int]]
) -> None:
    def counts(rows: list[tuple[int, int]]) -> ScoreCounts:
        scores = np.array(rows, np.int32).reshape(-1, 2)
        return ScoreCounts.empty().plus(scores, scores == ABSENT)

    x, y, z = map(counts, (a, b, c))
    assert same(x.merged(y).merged(z), x.merged(y.merged(z)))
    assert same(x.merged(y), y.merged(x))
    assert same(x.merged(ScoreCounts.empty()), x)
    assert same(x.merged(y).merged(z), counts(c + a + b))
    assert same(ScoreCounts.from_arrays(x.to_arrays()), x)
    assert x.n[0] == sum(score != ABSENT for score, _ in a)
