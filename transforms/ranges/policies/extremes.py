"""`range`: flag what goes more than eps beyond the largest value ever counted.

The rule of Zhong & Raghunathan, "Watch the Weights" (arXiv 2508.00161). Its false-positive rate
is bounded by 2t/n for t directions and n conversations, so it needs large calibration sets.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from schemas.records import STEPS_PER_UNIT, Int32s, UInt8s
from transforms.ranges.fitted import Bools, Fitted, Integers, ScoreRule, Thresholds
from transforms.ranges.policies.base import PolicySettings
from transforms.ranges.ranges import Ranges


def farthest(excess: Int32s, _places: UInt8s) -> Integers:
    """Score of a stretch: its largest exceedance. Shapes as `ScoreRule.score`."""
    return excess.max(axis=1)


def beyond(eps: int, excess: Int32s, _places: UInt8s) -> Bools:
    """Which exceedances are of more than eps steps. Shapes as `ScoreRule.explains`."""
    return excess > eps


def fit_bounds(bounds: Int32s, ranges: Ranges, settings: PolicySettings) -> Fitted:
    """Flag any series over its bound by more than eps, in roles seen often enough."""
    eps = round(settings.eps * STEPS_PER_UNIT)
    n = [int(count) for count in ranges.conversations.stretches]
    user, assistant = (eps if count >= settings.min_calibration else None for count in n)
    thresholds: Thresholds = (user, assistant)
    rule = ScoreRule(farthest, partial(beyond, eps))
    return Fitted(bounds, (n[0] > 0, n[1] > 0), thresholds, rule, whole=True)


@dataclass(frozen=True, slots=True)
class ExtremesPolicy:
    """Bounds are the exact maxima of the counted conversations."""

    name: ClassVar[str] = "range"
    version: ClassVar[int] = 1
    keeps_scores: ClassVar[bool] = False
    asked_rate: ClassVar[float | None] = None

    settings: PolicySettings

    def fit(self, ranges: Ranges) -> Fitted:
        """See `Policy.fit`."""
        maxima = [group.conversations.maximum for group in ranges.groups]
        return fit_bounds(np.maximum.reduce(maxima).astype(np.int32), ranges, self.settings)
