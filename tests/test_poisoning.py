"""The budget policy over many epochs: traffic that stays as it is, and that is made to move.

An epoch stands for a day. Nothing here is a model's; the tails are like its scores' (fixed seeds).
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
from normal_traffic import DIRECTIONS, moved, traffic

from schemas.records import Role, Segments
from transforms.ranges.calibration import calibrate
from transforms.ranges.counting import count
from transforms.ranges.fitted import Fitted, Judgements
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges, close

EMPTY = Ranges.empty(DIRECTIONS, "d" * 64, "a-model")
RATE = 0.01
DAY = 300
"""Conversations."""

Epoch = Callable[[int], Segments]


def calibrated(n: int = 500) -> Ranges:
    segments = traffic(n, seed=1)
    return calibrate(lambda: [(np.arange(n), segments)], EMPTY)


def judged(ranges: Ranges, epochs: int, epoch: Epoch) -> Iterator[Judgements]:
    """Every epoch by those before it."""
    policy = make_policy("budget", PolicySettings(rate=RATE))
    for number in range(epochs):
        judgements = policy.fit(ranges).judge(epoch(number))
        yield judgements
        ranges = close(ranges, count(policy, EMPTY, judgements))


def test_the_rate_is_kept_over_200_epochs() -> None:
    days = judged(calibrated(), 200, lambda number: traffic(DAY, seed=1000 + number))
    shares = np.array([day.flagged.mean() for day in days])
    assert 0.007 <= shares.mean() <= 0.013
    for part in np.split(shares, 4):
        assert 0.006 <= part.mean() <= 0.014, "nor does it wander"


def test_learning_from_nothing_the_rate_is_kept_too() -> None:
    """What is judged before there are enough conversations is neither clean nor flagged."""
    days = list(judged(EMPTY, 150, lambda number: traffic(60, seed=3000 + number)))
    flagged, unsure = (
        np.array([getattr(day, name).mean() for day in days])
        for name in ("flagged", "uncalibrated")
    )
    known = int(np.argmax(unsure < 0.5))
    assert 4 <= known <= 10, "100 for the bounds, 199 scores by them"
    assert (flagged[: known - 1] == 0).all()
    assert 0.006 <= flagged[known:].mean() <= 0.016
    assert flagged[-50:].mean() <= 0.014


def test_conversations_counted_before_segments_were_are_not_taken_for_bounds() -> None:
    """What a state of a former version holds: bounds of nothing would make every score huge."""
    before = replace(calibrated(), segments=EMPTY.segments, scores=EMPTY.scores)
    assert before.without_segments > 450
    days = list(judged(before, 40, lambda number: traffic(60, seed=3000 + number)))
    anew = list(judged(EMPTY, 40, lambda number: traffic(60, seed=3000 + number)))
    assert not days[0].flagged.any()
    for mine, other in zip(days[-1].thresholds, anew[-1].thresholds, strict=True):
        assert mine is not None
        assert other is not None
        assert mine == pytest.approx(other, rel=0.5)


def triggered(n: int, seed: int, by: int) -> Segments:
    """Conversations in whose last segments the assistant is raised a little, at one place."""
    segments = traffic(n, seed)
    last = np.append(segments.row[1:] != segments.row[:-1], True)
    chosen = last & (segments.role == Role.ASSISTANT)
    for direction in range(DIRECTIONS):
        raised = segments.high[:, direction].astype(np.int64) + by
        values = np.where(chosen, raised, segments.high[:, direction])
        segments = moved(segments, chosen, direction, values[chosen])
    segments = replace(segments, high_at=np.where(chosen[:, None], np.uint8(30), segments.high_at))
    return segments.take(np.unique(segments.row[chosen]))


@pytest.mark.parametrize("share", [0.1, 0.02])
def test_a_flood_from_day_10_is_still_flagged_on_day_30(share: float) -> None:
    def epoch(day: int) -> Segments:
        attack = triggered(round(DAY * share * 1.3), seed=7000 + day, by=4000)
        return normal(day) if day < 10 else Segments.joined([normal(day), attack])

    def normal(day: int) -> Segments:
        return traffic(DAY, seed=5000 + day)

    days, calm = (list(judged(calibrated(), 31, each)) for each in (epoch, normal))
    found = [day.flagged[DAY:].mean() for day in days[10:]]
    assert found[0] > 0.95, "as it is when it begins"
    assert np.mean(found[-5:]) > 0.9
    false, without = (
        np.mean([day.flagged[:DAY].mean() for day in each[10:]]) for each in (days, calm)
    )
    assert abs(false - without) <= 0.003


def longer(segments: Segments, times: int) -> Segments:
    """With the last segment of every conversation so many times over."""
    last = np.append(segments.row[1:] != segments.row[:-1], True)
    index = np.repeat(np.arange(len(last)), np.where(last, times, 1))
    columns = [each.name for each in fields(segments) if each.name != "conversations"]
    return replace(segments, **{name: getattr(segments, name)[index] for name in columns})


@pytest.mark.parametrize(("attackers", "times"), [(40, 1), (4, 128)])
def test_what_a_frog_in_warming_water_gains_is_bounded(attackers: int, times: int) -> None:
    """An attacker who moves on whenever he was not flagged: a tenth of the traffic, or few and long
    conversations."""
    by, moves = 0, []

    def epoch(day: int) -> Segments:
        normal = traffic(DAY, seed=9000 + day)
        attack = triggered(3 * attackers, seed=11_000 + day, by=by).take(np.arange(attackers))
        return Segments.joined([normal, longer(attack, times)])

    for day in judged(calibrated(), 60, epoch):
        unseen = 1 - day.flagged[DAY:].mean()
        by += 100 if unseen > 0.9 else 0
        moves.append(by)
    # In the first days he gets to where nine in ten are not flagged, which needs no learning.
    assert moves[9] > 500
    assert moves[-1] - moves[9] <= 50 * 60, "at most 0.0018 in cosine a day"


MANY, DARED = 64, 20
"""Directions, and how many of them an attacker raises who knows bounds and thresholds."""


def daring(conversations: int, segments: int, bounds: np.ndarray, by: int) -> Segments:
    """A user's segments, DARED directions of which are so far above their bounds at one place."""
    rows = conversations * segments
    high = np.tile(bounds - 600, (rows, 1))
    high[:, :DARED] += 600 + by
    number = np.arange(rows)
    return Segments(
        conversations,
        (number // segments).astype(np.int32),
        np.full(rows, Role.USER, np.int8),
        (number % segments * 64).astype(np.uint32),
        np.full(rows, 64, np.uint8),
        np.full(high.shape, -1500, np.int16),
        high.astype(np.int16),
        np.zeros(high.shape, np.uint8),
        np.full(high.shape, 30, np.uint8),
    )


def farthest(fitted: Fitted, segments: int, bounds: np.ndarray) -> int:
    """How far above their bounds they pass."""
    tried = ((by, daring(1, segments, bounds, by)) for by in range(0, 4000, 25))
    flagged = (by for by, each in tried if fitted.judge(each).flagged.any())
    return next(flagged) - 25


@pytest.mark.parametrize(
    ("attackers", "segments", "gain"), [(30, 3, 200), (3, 3, 50), (3, 128, 100), (1, 2000, 50)]
)
def test_what_one_gains_who_knows_how_far_he_can_go(
    attackers: int, segments: int, gain: int
) -> None:
    """Every day he goes as far as he just can; `gain` is in steps a day."""
    policy, empty = make_policy("budget", PolicySettings(rate=RATE)), Ranges.empty(MANY, "", "")
    normal, bounds = traffic(2000, 1, MANY), []
    ranges = calibrate(lambda: [(np.arange(2000), normal)], empty)
    for day in range(8):
        fitted = policy.fit(ranges)
        bounds.append(fitted.bounds_of(Role.USER)[:MANY].astype(np.int64))
        attack = daring(attackers, segments, bounds[-1], farthest(fitted, segments, bounds[-1]))
        judgements = fitted.judge(Segments.joined([traffic(DAY, 100 + day, MANY), attack]))
        assert not judgements.flagged[DAY:].any()
        ranges = close(ranges, count(policy, empty, judgements))
    assert (bounds[-1] - bounds[0])[:DARED].mean() / 7 <= gain
