"""Score counts, handicaps and conformal thresholds against sorted lists of the raw scores."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.records import ABSENT, Role
from transforms.ranges.policies.budget import ENOUGH, GRAIN, TAIL, handicap_of, window_of
from transforms.ranges.scores import BIN_WIDTH, LENGTHS, ScoreCounts, Tally, length_of

HALF_PERCENT = Fraction("0.005")
PERCENT = Fraction("0.01")

Scored = list[tuple[int, int]]
"""Scores of one role and lengths, a pair per conversation."""

SCORES: st.SearchStrategy[int] = st.integers(-90_000, 400_000).filter(lambda n: n != ABSENT)
LENGTH: st.SearchStrategy[int] = st.integers(0, LENGTHS - 1)
RATES = st.fractions(Fraction(1, 100), Fraction(9, 10))


def counted(user: list[int], assistant: list[int] | None = None) -> ScoreCounts:
    """Counts of conversations that all have a user; those beyond `assistant` have no assistant."""
    missing = len(user) - len(assistant or [])
    scores = np.array([user, (assistant or []) + [ABSENT] * missing], np.int32).T
    return ScoreCounts.empty().plus(scores, np.zeros(scores.shape, np.int64), scores == ABSENT)


def tally_of(scored: Scored) -> Tally:
    scores, lengths = np.array(scored, np.int32).reshape(-1, 2).T
    return Tally.of(*(np.empty(0, np.int64) for _ in range(3))).plus(
        scores, lengths.astype(np.int64)
    )


def expanded(tally: Tally) -> Scored:
    """The bins and lengths of all scores, sorted."""
    columns = (tally.bins.tolist(), tally.lengths.tolist(), tally.counts.tolist())
    return sorted(
        pair for bin_, length, n in zip(*columns, strict=True) for pair in [(bin_, length)] * n
    )


def same(one: ScoreCounts, other: ScoreCounts) -> bool:
    """Whether two counts are equal in every array."""
    mine, theirs = one.to_arrays(), other.to_arrays()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and np.array_equal(mine[name], theirs[name])
        for name in mine
    )


# --- lengths ------------------------------------------------------------------------------------


def test_lengths_are_powers_of_two_and_the_last_has_no_end() -> None:
    numbers = [0, 1, 2, 3, 4, 7, 8, 15, 16, 1023, 1024, 2047, 2048, 4095, 4096, 10**6, 2**40]
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 4, 9, 10, 10, 11, 11, 11, 11, 11]
    found = length_of(np.array(numbers))
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_every_length_begins_and_ends_where_it_should() -> None:
    for length in range(LENGTHS - 1):
        ends = np.array([2**length, 2 ** (length + 1) - 1, 2 ** (length + 1)])
        assert length_of(ends).tolist() == [length, length, length + 1]
    assert length_of(np.array([[3, 9], [0, 1]])).tolist() == [[1, 3], [0, 0]]


# --- tallies ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(SCORES | st.just(ABSENT), LENGTH), max_size=40))
def test_scores_are_counted_by_length_and_bin(scored: Scored) -> None:
    tally = tally_of(scored)
    present = [(score // BIN_WIDTH, length) for score, length in scored if score != ABSENT]
    assert tally.n == len(present)
    assert expanded(tally) == sorted(present)
    pairs = list(zip(tally.lengths.tolist(), tally.bins.tolist(), strict=True))
    assert pairs == sorted(set(pairs)), "every pair once, in ascending order"
    for length in range(LENGTHS):
        mine = tally.of_length(length)
        assert expanded(mine) == sorted(pair for pair in present if pair[1] == length)


@given(st.lists(st.tuples(SCORES, LENGTH), max_size=40), st.integers(0, 300))
def test_a_handicap_is_taken_off_for_every_doubling(scored: Scored, handicap: int) -> None:
    lowered = tally_of(scored).lowered(handicap)
    expected = sorted(
        (score - handicap * length * BIN_WIDTH) // BIN_WIDTH for score, length in scored
    )
    assert [bin_ for bin_, _ in expanded(lowered)] == expected
    assert (lowered.counts > 0).all()
    assert len(lowered.bins) == len(set(expected)), "of one length, every bin stands once"


# --- handicaps ----------------------------------------------------------------------------------


def slope(scored: Scored) -> float:
    """Of the line through the tails of all lengths that are frequent enough, in bins."""
    points = []
    for length in range(LENGTHS):
        bins = sorted(score // BIN_WIDTH for score, of in scored if of == length)
        if len(bins) >= ENOUGH:
            points.append((length, bins[math.ceil(TAIL * len(bins)) - 1], math.sqrt(len(bins))))
    if len(points) < 2:
        return 0.0
    x, y, weights = (np.array(column, float) for column in zip(*points, strict=True))
    return float(np.polyfit(x, y, 1, w=weights)[0])


@given(
    st.dictionaries(
        LENGTH,
        st.tuples(st.integers(1, 3 * ENOUGH), st.integers(-9000, 9000), st.integers(0, 3000)),
        max_size=5,
    ),
    st.integers(0, 2**32 - 1),
)
def test_the_handicap_is_half_the_slope_of_the_tails(
    lengths: dict[int, tuple[int, int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scored = [
        (middle + int(rng.integers(-spread, spread + 1)), length)
        for length, (n, middle, spread) in lengths.items()
        for _ in range(n)
    ]
    handicap = handicap_of(tally_of(scored))
    assert handicap % GRAIN == 0
    assert abs(handicap - max(slope(scored) / 2, 0.0)) <= GRAIN / 2 + 1e-6


ABOVE = int(40 * (1 - TAIL))
"""So many of 40 scores lie above the tail."""


def at(length: int, n: int, grains: int) -> Scored:
    """So many scores of a length, all the same: that many of what handicaps are multiples of."""
    return [(grains * GRAIN * BIN_WIDTH, length)] * n


@pytest.mark.parametrize(
    ("scored", "grains"),
    [
        ([], 0),
        (at(3, 500, 70), 0),
        (at(0, 20, 100) + at(1, 20, 110), 5),
        (at(2, 20, 100) + at(6, 20, 160), 8),  # 7.5, to the even neighbour
        (at(0, 20, 100) + at(1, 20, 90), 0),
        # The middle is 1.25, the slope (20 * -0.25 * 10 + 40 * 0.75 * 40) / 55 = 20.9.
        (at(0, 20, 0) + at(1, 20, 10) + at(2, 40, 40), 10),
        # What lies above the tail does not matter, however far.
        (at(0, 40 - ABOVE, 50) + at(0, ABOVE, 9999) + at(1, 40, 64), 7),
        (at(0, 39 - ABOVE, 50) + at(0, 1 + ABOVE, 80) + at(1, 40, 94), 7),
    ],
)
def test_handicaps_worked_out_by_hand(scored: Scored, grains: int) -> None:
    assert handicap_of(tally_of(scored)) == grains * GRAIN


def test_rare_lengths_have_no_say() -> None:
    assert ENOUGH == 20
    often = at(0, 50, 0) + at(1, 50, 10)
    assert handicap_of(tally_of(often + at(5, 19, 9000))) == 5 * GRAIN
    assert handicap_of(tally_of(often + at(5, 20, 9000))) > 500 * GRAIN
    assert handicap_of(tally_of(at(0, 19, 0) + at(1, 19, 10))) == 0


def test_a_handicap_brings_the_tails_of_lengths_half_way_together() -> None:
    rng = np.random.default_rng(0)
    scored = [
        (int(rng.gumbel(2000 + 800 * length, 200)), length)
        for length in range(8)
        for _ in range(500)
    ]
    handicap = handicap_of(tally_of(scored))
    coarse = GRAIN * BIN_WIDTH / 2
    assert abs(handicap * BIN_WIDTH - 400) <= 10 + coarse
    lowered = [(score - handicap * BIN_WIDTH * length, length) for score, length in scored]
    tails = [
        np.quantile([score for score, of in lowered if of == length], float(TAIL))
        for length in range(8)
    ]
    assert abs(tails[7] - tails[0] - 7 * 400) < 150 + 7 * coarse


# --- thresholds ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=60), RATES)
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


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(SCORES, LENGTH), min_size=1, max_size=60),
    st.integers(0, 12),
    RATES,
    st.integers(0, 500),
    st.sampled_from(Role),
)
def test_threshold_with_a_handicap_is_that_of_the_lowered_scores(
    scored: Scored, absent: int, rate: Fraction, handicap: int, role: Role
) -> None:
    rows = [*scored, *[(ABSENT, 0)] * absent]
    scores, lengths = (np.zeros((len(rows), 2), np.int64) for _ in range(2))
    scores[:, role], lengths[:, role] = np.array(rows).T
    counts = ScoreCounts.empty().plus(scores.astype(np.int32), lengths, scores == ABSENT)
    threshold = counts.conformal_threshold(role, rate / 2, rate, handicap)
    lowered = sorted(score - handicap * BIN_WIDTH * length for score, length in scored)
    everybody = [-math.inf] * absent + lowered
    k_of_all = math.ceil((len(everybody) + 1) * (1 - rate / 2))
    k_of_own = math.ceil((len(lowered) + 1) * (1 - rate))
    if k_of_all > len(everybody) or k_of_own > len(lowered):
        assert threshold is None
    else:
        exact = max(everybody[k_of_all - 1], lowered[k_of_own - 1])
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


@pytest.mark.parametrize(("present", "handicap"), [(1.0, 0), (0.7, 0), (0.7, 40)])
def test_new_conversations_exceed_at_most_at_the_asked_rate(present: float, handicap: int) -> None:
    rng = np.random.default_rng(4)
    rate, n, rounds = Fraction("0.05"), 59, 3000
    flagged = 0
    for _ in range(rounds):
        lengths = rng.integers(0, 6, (n + 1, 2))
        scores = np.rint(rng.standard_cauchy((n + 1, 2)) * 500 + 300 * lengths)
        scores = scores.clip(-90_000, 400_000)
        scores = np.where(rng.random((n + 1, 2)) < present, scores, ABSENT).astype(np.int32)
        counts = ScoreCounts.empty().plus(scores[:n], lengths[:n], scores[:n] == ABSENT)
        threshold = counts.conformal_threshold(Role.USER, rate, 2 * rate, handicap)
        assert threshold is not None
        lowered = scores[n, Role.USER] - handicap * BIN_WIDTH * lengths[n, Role.USER]
        flagged += bool(scores[n, Role.USER] != ABSENT and lowered > threshold)
    spread = 3 * math.sqrt(float(rate) / rounds)
    assert 0 < flagged / rounds <= float(rate) + spread


# --- what was far above a threshold -------------------------------------------------------------


def counted_with_held(kept: Scored, held: Scored, absent: int = 0) -> ScoreCounts:
    """Counts of a user's scores, some held down to what they say; nobody has an assistant."""
    rows = [(*each, ABSENT) for each in kept] + [(300_000, n, score) for score, n in held]
    rows += [(ABSENT, 0, ABSENT)] * absent
    user, lengths, down = np.array(rows, np.int64).reshape(-1, 3).T
    nobody = np.full(len(rows), ABSENT)
    scores = np.stack([user, nobody], axis=1).astype(np.int32)
    return ScoreCounts.empty().plus(
        scores,
        np.stack([lengths, lengths], axis=1),
        scores == ABSENT,
        np.stack([down, nobody], axis=1).astype(np.int32),
    )


@given(
    st.lists(st.tuples(SCORES, LENGTH), max_size=20),
    st.lists(st.tuples(SCORES, LENGTH), max_size=20),
    st.integers(0, 5),
)
def test_scores_that_are_held_down_are_counted_as_what_they_are_held_down_to(
    kept: Scored, held: Scored, absent: int
) -> None:
    def bins(scored: Scored) -> Scored:
        return sorted((score // BIN_WIDTH, length) for score, length in scored)

    counts = counted_with_held(kept, held, absent)
    assert expanded(counts.kept[Role.USER]) == bins(kept)
    assert expanded(counts.held[Role.USER]) == bins(held)
    assert expanded(counts.of_role(Role.USER)) == bins(kept + held)
    assert counts.n == (len(kept) + len(held), 0)
    assert counts.absent.tolist() == [absent, len(kept) + len(held) + absent]


def test_a_flood_lifts_no_threshold() -> None:
    kept = [(score, 0) for score in range(0, 8 * 980, 8)]
    rate = Fraction(1, 50)
    for flood in (20, 1000):
        counts = counted_with_held(kept, [(8 * 979 + 7, 0)] * flood)
        assert counts.conformal_threshold(Role.USER, rate, rate) == 8 * 979 + 7


def test_a_window_is_where_three_in_four_of_a_falling_tail_are() -> None:
    rng = np.random.default_rng(0)
    scale = 900.0
    scores = np.rint(rng.exponential(scale, 20_000)).astype(np.int64).tolist()
    tally = tally_of([(score, 0) for score in scores])
    window = window_of(tally, 0, Fraction(100))
    assert window == pytest.approx(scale * math.log(4), rel=0.05)
    above = np.quantile(scores, 0.99)
    farther = np.mean(np.array(scores) > above + window) / 0.01
    assert farther == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(("expected", "most"), [(100, 130), (5, 11), (Fraction(1, 4), 1)])
def test_a_flood_closes_the_window(expected: Fraction, most: int) -> None:
    tally = tally_of([(score, 0) for score in range(0, 8000, 8)])
    assert window_of(tally, most, Fraction(expected)) > 0
    assert window_of(tally, most + 1, Fraction(expected)) == 0
    assert window_of(tally_of([]), 0, Fraction(expected)) == 0


# --- counts -------------------------------------------------------------------------------------

Kind = tuple[int, int, int]
"""A score, its length, and what it was held down to; ABSENT: it was not."""
Both = list[tuple[Kind, Kind]]
"""Of user and assistant, per conversation."""

SCORED: st.SearchStrategy[Kind] = st.tuples(SCORES, LENGTH, SCORES | st.just(ABSENT))
BOTH: st.SearchStrategy[Both] = st.lists(
    st.tuples(SCORED, SCORED | st.just((ABSENT, 0, ABSENT))), max_size=8
)


def counts_of(rows: Both) -> ScoreCounts:
    scores, lengths, held = np.array(rows, np.int64).reshape(-1, 2, 3).transpose(2, 0, 1)
    return ScoreCounts.empty().plus(
        scores.astype(np.int32), lengths, scores == ABSENT, held.astype(np.int32)
    )


@settings(max_examples=50, deadline=None)
@given(BOTH, BOTH, BOTH)
def test_merging_is_a_commutative_monoid_and_arrays_read_back(a: Both, b: Both, c: Both) -> None:
    x, y, z = map(counts_of, (a, b, c))
    assert same(x.merged(y).merged(z), x.merged(y.merged(z)))
    assert same(x.merged(y), y.merged(x))
    assert same(x.merged(ScoreCounts.empty()), x)
    assert same(x.merged(y).merged(z), counts_of(c + a + b))
    assert same(ScoreCounts.from_arrays(x.to_arrays()), x)
    assert x.n == (len(a), len(a) - int(x.absent[Role.ASSISTANT]))
    for role in Role:
        mine = [row[role] for row in a if row[role][0] != ABSENT]
        assert x.absent[role] == len(a) - len(mine)
        under = [(score // BIN_WIDTH, length) for score, length, held in mine if held == ABSENT]
        held = [(held // BIN_WIDTH, length) for _, length, held in mine if held != ABSENT]
        for tallies, expected in ((x.kept, under), (x.held, held)):
            assert expanded(tallies[role]) == sorted(expected)


def test_arrays_are_those_that_are_documented() -> None:
    user = [(17, 2, ABSENT), (17, 2, ABSENT), (-1, 0, ABSENT), (90, 5, 70)]
    assistant = [(ABSENT, 0, ABSENT), (80, 1, ABSENT), (80, 3, ABSENT), (80, 3, ABSENT)]
    arrays = counts_of(list(zip(user, assistant, strict=True))).to_arrays()
    expected = {
        "absent": [0, 1],
        "user_kept_lengths": [0, 2],
        "user_kept_bins": [-1, 2],
        "user_kept_counts": [1, 2],
        "user_held_lengths": [5],
        "user_held_bins": [8],
        "user_held_counts": [1],
        "assistant_kept_lengths": [1, 3],
        "assistant_kept_bins": [10, 10],
        "assistant_kept_counts": [1, 2],
        **{f"assistant_held_{name}": [] for name in ("lengths", "bins", "counts")},
    }
    assert {name: array.tolist() for name, array in arrays.items()} == expected
    for name, array in arrays.items():
        assert array.dtype == (np.int32 if name.endswith(("lengths", "bins")) else np.int64), name


@pytest.mark.parametrize("name", ["absent", "user_kept_lengths", "assistant_held_counts"])
def test_a_missing_array_is_refused(name: str) -> None:
    arrays = counted([1, 2, 3]).to_arrays()
    del arrays[name]
    with pytest.raises(KeyError, match=name):
        ScoreCounts.from_arrays(arrays)
