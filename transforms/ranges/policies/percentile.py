"""`percentile`: flag what goes more than eps beyond a percentile of the conversations' extremes.

The variant of `range` in the same paper (arXiv 2508.00161), which does not let one odd
conversation in the calibration set widen a range for good.
"""

from dataclasses import dataclass
from typing import ClassVar

from transforms.ranges.fitted import Fitted, ScoreRule
from transforms.ranges.policies.base import Missing, PolicySettings, widest
from transforms.ranges.policies.extremes import farthest_rule, fit_bounds, missing_of
from transforms.ranges.ranges import Ranges


@dataclass(frozen=True, slots=True)
class PercentilePolicy:
    """Bounds are quantiles of the counted conversations."""

    name: ClassVar[str] = "percentile"
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
        q = self.settings.percentile / 100
        bounds = widest(ranges, lambda each: each.conversations.quantile_of_all(q))
        return fit_bounds(bounds, ranges, self.settings)

    def missing(self, ranges: Ranges) -> Missing:
        """See `Policy.missing`."""
        return missing_of(ranges, self.settings)
