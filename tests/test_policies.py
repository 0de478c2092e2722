"""Policies against a judge in plain Python that knows nothing of arrays, bins or series order."""

import math
import statistics
from dataclasses import fields, replace
from typing import Any

import numpy as np
import oracle
import pytest
from extremes import as_oracle, segments_from, whole
from normal_traffic import DIRECTIONS, moved, traffic

from schemas.errors import ConfigurationError
from schemas.records import ABSENT, Exceedance, Judgement, Role, Segments, Side, Status
from transforms.ranges.calibration import calibrate
from transforms.ranges.counting import count
from transforms.ranges.policies import (
    POLICY_NAMES,
    Fitted,
    Judgements,
    PolicySettings,
    make_policy,
)
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import Stretches

SETTINGS = PolicySettings(rate=0.05, percentile=95, min_calibration=30, eps=0.01)
EPS = 328


EMPTY = Ranges.empty(DIRECTIONS, "d" * 64, "a-model")


def fitted_to(segments: Segments) -> Ranges:
    """Ranges calibrated on conversations."""
    return calibrate(lambda: [(np.arange(segments.conversations), segments)], EMPTY)


def calibrated(n: int = 300, seed: int = 1) -> Ranges:
    """Ranges of `n` conversations."""
    return fitted_to(traffic(n, seed))


def naive_judge(name: str, fitted: Fitted, ranges: Ranges) -> oracle.Judge:
    """The oracle's judge by a fitted policy's own bounds, thresholds and handicaps."""
    names = [
        (role, direction, side)
        for side in (Side.HIGH, Side.LOW)
        for role in Role
        for direction in range(DIRECTIONS)
    ]
    least = 100 if name == "budget" else 1
    return oracle.Judge(
        oracle.Rules(name),
        {name: int(bound) for name, bound in zip(names, fitted.bounds, strict=True)},
        {role: bool(ranges.conversations.stretches[role] >= least) for role in Role},
        {role: fitted.thresholds[role] for role in Role},
        {role: 8 * fitted.handicaps[role] for role in Role},
        {role: fitted.windows[role] for role in Role},
    )


def judge(name: str, ranges: Ranges, segments: Segments) -> Judgements:
    return make_policy(name, SETTINGS).fit(ranges).judge(segments)


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("n", [0, 1, 25, 150, 400])
def test_every_judgement_is_that_of_the_naive_judge(name: str, n: int) -> None:
    policy, ranges, segments = make_policy(name, SETTINGS), calibrated(n), traffic(150, seed=2)
    fitted = policy.fit(ranges)
    records = fitted.judge(segments).records()
    naive = naive_judge(name, fitted, ranges)
    for row, record in enumerate(records):
        assert record == naive.judge(as_oracle(segments, row))


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_all_three_answers_occur_where_they_should(name: str) -> None:
    segments = traffic(200, seed=2)
    present = np.unique(segments.row)
    for n, expected in ((20, {Status.UNCALIBRATED}), (400, set(Status) - {Status.UNCALIBRATED})):
        judgements = judge(name, calibrated(n), segments)
        assert {judgements.status(int(row)) for row in present} == expected


def test_range_bounds_are_the_extremes_and_eps_decides() -> None:
    segments = traffic(300, seed=1)
    floor = int(segments.low[segments.role == Role.USER, 3].min())
    quiet = [0] * DIRECTIONS
    just, beyond = quiet.copy(), quiet.copy()
    just[3], beyond[3] = floor - EPS, floor - EPS - 1
    given = segments_from([[(0, just, quiet)], [(0, quiet, quiet), (0, beyond, quiet)]], DIRECTIONS)
    first, second = judge("range", fitted_to(segments), given).records()
    assert first.status is Status.CLEAN
    # In the second segment of ten tokens, whose lowest stand at its fourth.
    expected = Exceedance(Role.USER, 3, Side.LOW, floor - EPS - 1, floor, EPS + 1, 13)
    assert (second.status, second.exceedances) == (Status.FLAGGED, (expected,))


def test_bounds_are_quantiles_of_segments_or_of_conversations() -> None:
    segments = traffic(300, seed=1)
    bounds = {
        name: make_policy(name, SETTINGS).fit(fitted_to(segments)).bounds for name in POLICY_NAMES
    }
    conversations = whole(segments)
    spoke = (conversations.high != ABSENT).any(axis=1)
    for direction in range(2 * DIRECTIONS):
        role, number = divmod(direction, DIRECTIONS)
        values = segments.high[segments.role == role, number]
        assert abs(bounds["budget"][direction] - np.quantile(values, 0.99)) <= 32
        # ABSENT, the lowest value there is, stands for conversations without the role.
        highest = conversations.high[spoke, direction]
        assert abs(bounds["percentile"][direction] - np.quantile(highest, 0.95)) <= 32
        assert bounds["range"][direction] == highest.max()


def test_only_the_role_that_is_calibrated_can_flag() -> None:
    segments = traffic(300, seed=1)
    kept = (segments.role == Role.USER) | (segments.row >= 290)
    only_user = replace(
        segments,
        **{
            each.name: getattr(segments, each.name)[kept]
            for each in fields(segments)
            if each.name != "conversations"
        },
    )
    ranges = fitted_to(only_user)
    quiet, loud = [0] * DIRECTIONS, [30_000] * DIRECTIONS
    probe = segments_from(
        [
            [(0, quiet, quiet), (1, quiet, quiet)],
            [(0, quiet, quiet), (1, quiet, loud)],
            [(0, quiet, loud), (1, quiet, quiet)],
        ],
        DIRECTIONS,
    )
    for name in POLICY_NAMES:
        records = judge(name, ranges, probe).records()
        statuses = [record.status for record in records]
        assert statuses == [Status.UNCALIBRATED, Status.UNCALIBRATED, Status.FLAGGED], name
        assert records[1].threshold is None
        assert {item.role for item in records[2].exceedances} == {Role.USER}


def test_a_conversation_without_any_role_is_not_calibrated() -> None:
    for name in POLICY_NAMES:
        judgements = judge(name, calibrated(), Segments.none(1, DIRECTIONS))
        assert judgements.records() == (Judgement(Status.UNCALIBRATED, None, None, None, ()),)


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 125), (0.01, 199)])
def test_budget_needs_as_many_conversations_as_the_rate_says(rate: float, needed: int) -> None:
    """2 / rate - 1, and four fifths of them are as many as bounds need."""
    policy = make_policy("budget", PolicySettings(rate=rate))
    both = [(0, [-9] * DIRECTIONS, [9] * DIRECTIONS), (1, [-9] * DIRECTIONS, [9] * DIRECTIONS)]
    for n, known in ((needed - 1, False), (needed, True)):
        ranges = fitted_to(segments_from([both] * n, DIRECTIONS))
        thresholds = policy.fit(ranges).thresholds
        assert [threshold is not None for threshold in thresholds] == [known, known]


@pytest.mark.parametrize(
    ("places", "score", "named"),
    [
        ([0, 15, 40], 500, {0, 1}),
        ([0, 16, 40], 400, {2}),
        ([7, 16, 23], 600, {1, 2}),
        ([8, 16, 23], 900, {0, 1, 2}),
        ([48, 55, 63], 900, {0, 1, 2}),
    ],
)
def test_exceedances_count_together_where_they_stand_within_16_tokens(
    places: list[int], score: int, named: set[int]
) -> None:
    """From any multiple of 8 on; a value below its bound takes nothing off."""
    excess = np.array([300, 200, 400, -900, 0], np.int32)
    at = np.array([*places, places[0], places[0]], np.uint8)
    rule = make_policy("budget", SETTINGS).fit(EMPTY).rule
    assert rule.score(excess[None], at[None]).tolist() == [score]
    assert set(np.flatnonzero(rule.explains(excess, at)).tolist()) == named


@pytest.mark.parametrize(
    ("n", "user", "assistant"), [(199, 1, 1), (250, 1, 1), (300, 1, 2), (500, 2, 3), (999, 5, 5)]
)
def test_of_the_rate_nothing_is_left_to_either_role(n: int, user: int, assistant: int) -> None:
    """As many scores are above the thresholds as the rate allows among so many and the next."""
    scores = np.repeat(np.arange(n, dtype=np.int32)[:, None] * 8, 2, axis=1)
    ranges = calibrated()
    ranges = replace(ranges, scores=EMPTY.scores).plus_scores(
        scores, np.zeros((n, 2), np.int64), np.zeros((n, 2), np.bool_)
    )
    fitted = make_policy("budget", PolicySettings(rate=0.01)).fit(ranges)
    above = [int((scores[:, role] > fitted.thresholds[role]).sum()) for role in Role]
    assert above == [user - 1, assistant - 1], "and the next may be above"
    assert user + assistant <= (n + 1) // 100


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_flagged_conversations_do_not_widen_series(name: str) -> None:
    segments = traffic(200, seed=2)
    segments = moved(segments, (segments.row < 50) & (segments.role == Role.USER), 3, 32_000)
    policy, judgements = make_policy(name, SETTINGS), judge(name, calibrated(), segments)
    statuses = [record.status for record in judgements.records()]
    counted = count(policy, EMPTY, judgements)
    kept = segments.take([row for row, each in enumerate(statuses) if each is not Status.FLAGGED])
    assert 0 < kept.conversations <= 160
    expected = EMPTY.plus(Stretches.of(kept))
    np.testing.assert_array_equal(counted.segments.histogram, expected.segments.histogram)
    np.testing.assert_array_equal(counted.conversations.maximum, expected.conversations.maximum)
    assert counted.segments.maximum[3] < 32_000
    assert (sum(counted.scores.n) > 0) == (name == "budget")


def test_a_flood_of_flagged_conversations_hardly_lifts_thresholds() -> None:
    """Nor handicaps, and only at first; half of all traffic is of the flood."""
    policy, before = make_policy("budget", SETTINGS), calibrated()
    flooded = before
    for epoch in range(8):
        quiet, flood = traffic(100, seed=30 + epoch), traffic(100, seed=60 + epoch)
        flood = moved(flood, np.ones(len(flood.row), np.bool_), 0, 25_000)
        both = policy.fit(flooded).judge(Segments.joined([quiet, flood]))
        assert both.flagged[100:][np.unique(flood.row)].all()
        flooded = close(flooded, count(policy, EMPTY, both))
    for role in Role:
        assert limits(policy.fit(flooded), role) <= 1.25 * limits(policy.fit(before), role)


def limits(fitted: Fitted, role: Role) -> float:
    """What a role's highest score may be at most, on the average over lengths 0 to 2."""
    threshold = fitted.thresholds[role]
    assert threshold is not None
    return threshold + 8 * fitted.handicaps[role]


def test_epochs_of_normal_traffic_do_not_wear_the_tail_away() -> None:
    """Were flagged scores left out, the share of flagged conversations would creep up."""
    policy, ranges = make_policy("budget", SETTINGS), calibrated(600)
    shares = []
    for epoch in range(12):
        judgements = policy.fit(ranges).judge(traffic(600, seed=100 + epoch))
        shares.append(judgements.flagged.mean())
        ranges = close(ranges, count(policy, EMPTY, judgements))
    assert statistics.mean(shares[-4:]) <= 1.5 * SETTINGS.rate


@pytest.mark.parametrize("rate", [0.05, 0.01])
def test_normal_traffic_is_flagged_at_most_at_the_asked_rate(rate: float) -> None:
    policy, segments = make_policy("budget", PolicySettings(rate=rate)), traffic(4000, seed=50)
    shares = []
    for seed in range(12):
        judgements = policy.fit(calibrated(500, seed=60 + seed)).judge(segments)
        shares.append(judgements.flagged.mean())
    assert 0 < statistics.mean(shares) <= rate + 2 * statistics.stdev(shares) / math.sqrt(12)


def test_calibration_scores_each_fold_by_the_others() -> None:
    segments = traffic(203, seed=9)
    ranges = fitted_to(segments)
    policy = make_policy("budget", SETTINGS)
    expected: list[list[tuple[int, int]]] = [[], []]
    for fold in range(5):
        others = [row for row in range(203) if row % 5 != fold]
        counted = EMPTY.plus(Stretches.of(segments.take(others)))
        naive = naive_judge("budget", policy.fit(counted), counted)
        for row in range(fold, 203, 5):
            for role, found in naive.role_scores(as_oracle(segments, row)).items():
                if found is not None:
                    score, stretches = found
                    expected[role].append((stretches.bit_length() - 1, score // 8))
    for role in Role:
        tally = ranges.scores.kept[role]
        pairs = np.repeat(np.stack([tally.lengths, tally.bins], axis=1), tally.counts, axis=0)
        assert [tuple(pair) for pair in pairs.tolist()] == sorted(expected[role])
    everything = EMPTY.plus(Stretches.of(segments))
    np.testing.assert_array_equal(ranges.segments.histogram, everything.segments.histogram)


def test_calibration_does_not_depend_on_the_parts_it_comes_in() -> None:
    segments = traffic(250, seed=4)
    rows = np.random.default_rng(0).permutation(250)
    parts = [(part, segments.take(part)) for part in np.array_split(rows, 7)]
    assert calibrate(lambda: parts, EMPTY).hash == fitted_to(segments).hash


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


def is_calibrated(name: str, ranges: Ranges) -> list[bool]:
    thresholds = make_policy(name, PolicySettings(rate=0.02)).fit(ranges).thresholds
    return [threshold is not None for threshold in thresholds]


@pytest.mark.parametrize("n", [20, 110, 130, 160])
@pytest.mark.parametrize("role", Role)
def test_a_role_is_calibrated_once_those_are_there_that_were_missing(n: int, role: Role) -> None:
    policy, ranges = make_policy("budget", PolicySettings(rate=0.02)), calibrated(n)
    missing = policy.missing(ranges)
    assert [each == 0 for each in missing] == is_calibrated("budget", ranges)
    unsettled = max(100 - ranges.behind_segments(role), 0)
    settled = Stretches.of(traffic(200 if unsettled else 0, seed=9))
    lacking = missing[role] - unsettled
    for more in range(lacking + 1):
        scores = np.full((more, 2), ABSENT, np.int32)
        scores[:, role] = 500
        nothing = np.zeros((more, 2), np.int64)
        grown = ranges.plus(settled).plus_scores(scores, nothing, nothing.astype(bool))
        assert is_calibrated("budget", grown)[role] == (more == lacking)


@pytest.mark.parametrize("name", ["range", "percentile"])
def test_the_paper_s_policies_miss_conversations_up_to_what_was_asked_for(name: str) -> None:
    ranges = calibrated(60)
    counted = ranges.conversations.stretches.tolist()
    policy = make_policy(name, PolicySettings(min_calibration=50))
    assert list(policy.missing(ranges)) == [max(50 - each, 0) for each in counted]
    assert any(policy.missing(ranges))
    thresholds = policy.fit(ranges).thresholds
    assert [each is None for each in thresholds] == [each > 0 for each in policy.missing(ranges)]


@pytest.mark.parametrize("name", ["range", "percentile", "budget"])
def test_accepted_conversations_are_within_bounds_however_many_there_are_of_others(
    name: str,
) -> None:
    ranges, odd = calibrated(600), traffic(200, seed=77)
    odd = replace(odd, high=(odd.high + 3000).astype(np.int16))
    policy = make_policy(name, PolicySettings(rate=0.02, min_calibration=100))
    assert policy.fit(ranges).judge(odd).flagged.mean() > 0.9
    accepting = ranges.accepting(of(odd.take(np.arange(100))))
    fitted = policy.fit(accepting)
    others = fitted.judge(odd.take(np.arange(100, 200))).flagged.mean()
    assert others <= {"budget": 0.04, "range": 0.3, "percentile": 0.3}[name]
    huge = replace(accepting, segments=_times(accepting.segments), scores=_times(accepting.scores))
    np.testing.assert_allclose(policy.fit(huge).bounds, fitted.bounds, atol=32)
    assert fitted.thresholds == policy.fit(ranges).thresholds


def test_one_accepted_conversation_raises_no_threshold() -> None:
    """However high its score: what is as high elsewhere is flagged as before."""
    ranges, other = calibrated(600), traffic(200, seed=77)
    other = other.take(np.unique(other.row[other.role == Role.USER]))
    odd, elsewhere = (
        moved(other, other.role == Role.USER, direction, 12_000) for direction in (2, 3)
    )
    policy = make_policy("budget", PolicySettings(rate=0.02))
    fitted = policy.fit(ranges.accepting(of(odd.take(np.array([0])))))
    assert policy.fit(ranges).judge(odd).flagged.all()
    assert fitted.judge(odd).flagged.mean() < 0.05
    assert fitted.judge(elsewhere).flagged.all()


@pytest.mark.parametrize("name", ["range", "percentile", "budget"])
def test_accepted_conversations_say_nothing_of_a_role_they_lack(name: str) -> None:
    ranges = calibrated(600)
    odd = traffic(200, seed=77)
    prompts = odd.take(np.flatnonzero(np.bincount(odd.row, odd.role, odd.conversations) == 0))
    accepting = ranges.accepting(of(prompts))
    assert accepting.accepted is not None
    assert accepting.accepted.conversations.stretches[Role.ASSISTANT] == 0
    lower = replace(accepting, segments=_lowered(ranges), conversations=_lowered(ranges))
    policy = make_policy(name, PolicySettings(rate=0.02, min_calibration=100))
    alone = policy.fit(replace(lower, accepted=None)).bounds_of(Role.ASSISTANT)
    assert alone.max() < 0
    np.testing.assert_array_equal(policy.fit(lower).bounds_of(Role.ASSISTANT), alone)


def of(segments: Segments) -> Ranges:
    """Ranges of no more than these conversations."""
    return EMPTY.plus(Stretches.of(segments))


def _lowered(ranges: Ranges) -> Any:
    """Counts of conversations whose values are all far below 0."""
    segments = traffic(600, seed=1)
    low = replace(Stretches.of(segments), values=np.full((len(segments.row), 14), -3000, np.int16))
    return ranges.emptied().plus(low).segments


def _times(counted: Any) -> Any:
    """The same a hundred and twenty-eight times."""
    for _ in range(7):
        counted = counted.merged(counted)
    return counted
