"""Policies against a judge in plain Python that knows nothing of arrays, bins or series order."""

import math
import statistics

import numpy as np
import oracle
import pytest

from schemas.errors import ConfigurationError
from schemas.records import ABSENT, Cosines, Exceedance, Judgement, Role, Side, Status
from transforms.ranges.calibration import calibrate
from transforms.ranges.counting import count
from transforms.ranges.counts import Counts
from transforms.ranges.policies import POLICY_NAMES, Fitted, PolicySettings, make_policy
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import series_values

DIRECTIONS = 7
SETTINGS = PolicySettings(rate=0.05, percentile=95, min_calibration=30, eps=0.01)
EPS = 328


def traffic(n: int, seed: int, directions: int = DIRECTIONS) -> tuple[Cosines, np.ndarray]:
    """Cosines that share a factor per conversation and side, some without a role; tokens."""
    rng = np.random.default_rng(seed)
    shape = (n, 2 * directions)
    common = rng.exponential(300, (n, 1))
    middle = np.linspace(-800, 800, 2 * directions)
    high = np.rint(middle + 1500 + common + rng.exponential(400, shape)).astype(np.int16)
    low = np.rint(middle - 1500 - common - rng.exponential(400, shape)).astype(np.int16)
    tokens = rng.integers(8, 2000, n)
    absent = rng.random((n, 2)) < [0.05, 0.2]
    gone = np.repeat(absent, directions, axis=1)
    nowhere = np.zeros(shape, np.uint32)
    return Cosines(
        np.where(gone, ABSENT, low), np.where(gone, ABSENT, high), nowhere, nowhere
    ), tokens


def calibrated(n: int = 300, seed: int = 1) -> Ranges:
    """Ranges of `n` conversations."""
    cosines, tokens = traffic(n, seed)
    return calibrate(series_values(cosines), tokens, "d" * 64, "a-model")


def naive_judge(name: str, fitted: Fitted, ranges: Ranges) -> oracle.Judge:
    """The oracle's judge by a fitted policy's own bounds and thresholds."""
    names = [
        (role, direction, side)
        for side in (Side.HIGH, Side.LOW)
        for role in Role
        for direction in range(DIRECTIONS)
    ]
    return oracle.Judge(
        oracle.Rules(name),
        {name: int(bound) for name, bound in zip(names, fitted.bounds, strict=True)},
        {role: bool(ranges.counts.conversations[role] > 0) for role in Role},
        {role: fitted.thresholds[role] for role in Role},
    )


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("n", [0, 1, 25, 60, 300])
def test_every_judgement_is_that_of_the_naive_judge(name: str, n: int) -> None:
    policy, ranges = make_policy(name, SETTINGS), calibrated(n)
    cosines, tokens = traffic(200, seed=2)
    fitted = policy.fit(ranges)
    records = fitted.judge(series_values(cosines), tokens).records()
    naive = naive_judge(name, fitted, ranges)
    for row, record in enumerate(records):
        assert record == naive.judge(cosines.low[row], cosines.high[row], int(tokens[row]))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_all_three_answers_occur_where_they_should(name: str) -> None:
    policy = make_policy(name, SETTINGS)
    cosines, tokens = traffic(200, seed=2)
    for n, expected in ((20, {Status.UNCALIBRATED}), (300, set(Status) - {Status.UNCALIBRATED})):
        judgements = policy.fit(calibrated(n)).judge(series_values(cosines), tokens)
        present = (series_values(cosines)[:, [0, DIRECTIONS]] != ABSENT).any(axis=1)
        statuses = {judgements.status(int(row)) for row in np.flatnonzero(present)}
        assert statuses == expected


def test_range_bounds_are_the_extremes_and_eps_decides() -> None:
    cosines, tokens = traffic(300, seed=1)
    fitted = make_policy("range", SETTINGS).fit(calibrated(300))
    column = cosines.low[:, 3][cosines.low[:, 3] != ABSENT]
    floor = int(column.min())
    low = np.full((2, 2 * DIRECTIONS), 0, np.int16)
    low[0, 3], low[1, 3] = floor - EPS, floor - EPS - 1
    given = Cosines(low, np.zeros_like(low), cosines.low_at[:2], cosines.high_at[:2])
    first, second = fitted.judge(series_values(given), tokens[:2]).records()
    assert first.status is Status.CLEAN
    expected = Exceedance(Role.USER, 3, Side.LOW, floor - EPS - 1, floor, EPS + 1)
    assert (second.status, second.exceedances) == (Status.FLAGGED, (expected,))


@pytest.mark.parametrize(("name", "q"), [("percentile", 0.95), ("budget", 0.9)])
def test_bounds_are_quantiles_of_conversations(name: str, q: float) -> None:
    values = series_values(traffic(300, seed=1)[0])
    values = values[(values != ABSENT).any(axis=1)]
    bounds = make_policy(name, SETTINGS).fit(calibrated(300)).bounds
    for series, bound in enumerate(bounds):
        # ABSENT, the lowest value there is, stands for conversations without the role.
        assert abs(bound - np.quantile(values[:, series], q)) <= 32


def test_only_the_role_that_is_calibrated_can_flag() -> None:
    cosines, tokens = traffic(300, seed=1)
    cosines.high[:290, DIRECTIONS:] = ABSENT
    cosines.low[:290, DIRECTIONS:] = ABSENT
    ranges = calibrate(series_values(cosines), tokens, "d" * 64, "a-model")
    probe = np.full((3, 4 * DIRECTIONS), 0, np.int32)
    probe[1, DIRECTIONS] = 30_000  # the assistant, far outside
    probe[2, 0] = 30_000  # the user, far outside
    for name in POLICY_NAMES:
        records = make_policy(name, SETTINGS).fit(ranges).judge(probe, np.full(3, 64)).records()
        statuses = [record.status for record in records]
        assert statuses == [Status.UNCALIBRATED, Status.UNCALIBRATED, Status.FLAGGED], name
        assert records[1].role is Role.ASSISTANT
        assert records[1].threshold is None
        assert {item.role for item in records[2].exceedances} == {Role.USER}


def test_a_conversation_without_any_role_is_not_calibrated() -> None:
    nobody = np.full((1, 4 * DIRECTIONS), ABSENT, np.int32)
    for name in POLICY_NAMES:
        judgements = make_policy(name, SETTINGS).fit(calibrated()).judge(nobody, np.array([5]))
        assert judgements.records() == (Judgement(Status.UNCALIBRATED, None, None, None, ()),)


def test_budget_needs_as_many_conversations_as_the_rate_says() -> None:
    values = np.zeros((40, 4), np.int32)
    for n, known in ((38, False), (39, True)):  # 2 / 0.05 - 1
        ranges = calibrate(values[:n], np.full(n, 64), "d" * 64, "a-model")
        thresholds = make_policy("budget", SETTINGS).fit(ranges).thresholds
        assert [threshold is not None for threshold in thresholds] == [known, known]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_flagged_conversations_do_not_widen_series(name: str) -> None:
    policy, ranges = make_policy(name, SETTINGS), calibrated()
    cosines, tokens = traffic(200, seed=2)
    values = series_values(cosines)
    values[:50, 3] = np.where(values[:50, 3] == ABSENT, ABSENT, 32_000)
    judgements = policy.fit(ranges).judge(values, tokens)
    statuses = [record.status for record in judgements.records()]
    counted = count(policy, ranges.emptied(), values, judgements)
    kept = [row for row, status in enumerate(statuses) if status is not Status.FLAGGED]
    assert 0 < len(kept) <= 150
    expected = Counts.empty(DIRECTIONS).plus(values[kept])
    np.testing.assert_array_equal(counted.counts.histogram, expected.histogram)
    assert counted.counts.maximum[3] < 32_000
    assert (sum(counted.scores.n) > 0) == (name == "budget")


def test_a_flood_of_flagged_conversations_lifts_no_threshold() -> None:
    policy, ranges = make_policy("budget", SETTINGS), calibrated()
    first = policy.fit(ranges).thresholds
    quiet = series_values(traffic(100, seed=3)[0])
    flood = quiet.copy()
    flood[:, :DIRECTIONS] = 25_000
    values, tokens = np.concatenate([quiet, flood]), np.full(200, 160)
    for _ in range(8):
        fitted = policy.fit(ranges)
        judgements = fitted.judge(values, tokens)
        assert judgements.flagged[100:].all()
        ranges = close(ranges, count(policy, ranges.emptied(), values, judgements))
    last = policy.fit(ranges).thresholds
    for before, after in zip(first, last, strict=True):
        assert before is not None
        assert after is not None
        assert after <= before


def test_epochs_of_normal_traffic_do_not_wear_the_tail_away() -> None:
    """Were flagged scores left out, the share of flagged conversations would creep up."""
    policy, ranges = make_policy("budget", SETTINGS), calibrated(600)
    shares = []
    for epoch in range(12):
        cosines, tokens = traffic(600, seed=100 + epoch)
        values = series_values(cosines)
        judgements = policy.fit(ranges).judge(values, tokens)
        shares.append(judgements.flagged.mean())
        ranges = close(ranges, count(policy, ranges.emptied(), values, judgements))
    assert statistics.mean(shares[-4:]) <= 1.5 * SETTINGS.rate


@pytest.mark.parametrize("rate", [0.05, 0.01])
def test_normal_traffic_is_flagged_at_most_at_the_asked_rate(rate: float) -> None:
    policy = make_policy("budget", PolicySettings(rate=rate))
    cosines, tokens = traffic(4000, seed=50)
    values = series_values(cosines)
    shares = []
    for seed in range(12):
        judgements = policy.fit(calibrated(500, seed=60 + seed)).judge(values, tokens)
        shares.append(judgements.flagged.mean())
    assert 0 < statistics.mean(shares) <= rate + 2 * statistics.stdev(shares) / math.sqrt(12)


def test_calibration_scores_each_fold_by_the_others() -> None:
    cosines, tokens = traffic(203, seed=9)
    values = series_values(cosines)
    ranges = calibrate(values, tokens, "d" * 64, "a-model")
    policy = make_policy("budget", SETTINGS)
    expected: list[list[int]] = [[], []]
    for fold in range(5):
        others = [row for row in range(203) if row % 5 != fold]
        counted = Ranges.empty(DIRECTIONS, "d" * 64, "a-model")
        counted = Ranges("d" * 64, "a-model", counted.counts.plus(values[others]), counted.scores)
        naive = naive_judge("budget", policy.fit(counted), counted)
        for row in range(fold, 203, 5):
            for role in Role:
                if cosines.high[row, role * DIRECTIONS] != ABSENT:
                    outside = naive.outside(role, cosines.low[row], cosines.high[row])
                    expected[role].append(naive.score(outside, int(tokens[row])) // 8)
    for role in Role:
        tally = ranges.scores.roles[role]
        assert np.repeat(tally.bins, tally.counts).tolist() == sorted(expected[role])
    whole = Counts.empty(DIRECTIONS).plus(values)
    np.testing.assert_array_equal(ranges.counts.histogram, whole.histogram)


def test_wrong_settings_are_refused_in_one_line() -> None:
    for wrong in (
        {"rate": 0},
        {"rate": 1},
        {"percentile": 101},
        {"eps": -1},
        {"min_calibration": 0},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            PolicySettings(**wrong)
    with pytest.raises(ConfigurationError, match="budget, percentile, range"):
        make_policy("median", SETTINGS)
