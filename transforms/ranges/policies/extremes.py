"""`range`: flag what goes more than eps beyond the largest value ever counted.

The rule of Zhong & Raghunathan, "Watch the Weights" (arXiv 2508.00161). Its false-positive rate
is bounded by 2t/n for t directions and n conversations, so it needs large calibration sets.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from schemas.records import STEPS_PER_UNIT, Int32s, UInt8s
from transforms.ranges.fitted import Bools, Fitted, Integers, ScoreRule, Thresholds
from transforms.ranges.policies.base import Missing, PolicySettings, widest
from transforms.ranges.ranges import Ranges


def farthest(excess: Int32s, _places: UInt8s) -> Integers:
    """Score of a stretch: its largest exceedance. Shapes as `ScoreRule.score`."""
    return excess.max(axis=1)


def flags_at_most(directions: int, conversations: int) -> float:
    """Bound of the paper, 2t/n, on the share of clean conversations that `range` flags for a role.

    A new conversation is the most extreme of n + 1 in a series with chance 1/(n + 1), and t
    directions have 2t series.
    """
    return min(2 * directions / max(conversations, 1), 1.0)


def farthest_rule(settings: PolicySettings) -> ScoreRule:
    """Every exceedance of more than eps is named."""
    return ScoreRule(farthest, Beyond(_eps(settings)))


@dataclass(frozen=True, slots=True)
class Beyond:
    """Says which exceedances are of more than eps steps. Shapes as `ScoreRule.explains`."""

    eps: int

    def __call__(self, excess: Int32s, _places: UInt8s) -> Bools:
        """Of one stretch."""
        return excess > self.eps


def fit_bounds(bounds: Int32s, ranges: Ranges, settings: PolicySettings) -> Fitted:
    """Flag any series over its bound by more than eps, in roles seen often enough."""
    eps = _eps(settings)
    n = [int(count) for count in ranges.conversations.stretches]
    user, assistant = (eps if count >= settings.min_calibration else None for count in n)
    thresholds: Thresholds = (user, assistant)
    known = (n[0] > 0, n[1] > 0)
    return Fitted(bounds, known, thresholds, farthest_rule(settings), whole=True)


def _eps(settings: PolicySettings) -> int:
    """In steps."""
    return round(settings.eps * STEPS_PER_UNIT)


def missing_of(ranges: Ranges, settings: PolicySettings) -> Missing:
    """How many more conversations it takes until each role has been seen often enough."""
    user, assistant = (
        max(settings.min_calibration - int(count), 0) for count in ranges.conversations.stretches
    )
    return user, assistant


@dataclass(frozen=True, slots=True)
class ExtremesPolicy:
    """Bounds are the exact maxima of the counted conversations."""

    name: ClassVar[str] = "range"
    version: ClassVar[int] = 1
    keeps_scores: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    asked_rate: ClassVar[float | None] = None

    settings: PolicySettings

    @property
    def rule(self) -> ScoreRule:
        """See `Policy.rule`."""
        return farthest_rule(self.settings)

    def fit(self, ranges: Ranges) -> Fitted:
        """See `Policy.fit`."""
        bounds = widest(ranges, lambda each: each.conversations.maximum.astype(np.int32))
        return fit_bounds(bounds, ranges, self.settings)

    def missing(self, ranges: Ranges) -> Missing:
        """See `Policy.missing`."""
        return missing_of(ranges, self.settings)
