"""`budget`: flag the conversations whose exceedances, taken together, are too much at a given rate.

A planted behaviour moves a dozen directions of one role a little at once, so a role's score is

    largest + sum of the ten largest / 2 - 0.03 log2(tokens / 64)

over the exceedances of its series over their 90th percentiles (cosine units; only positive ones
are summed). The last term is there because short conversations exceed less; `tokens` are those of
the whole conversation. The threshold of a role is the conformal quantile of the scores of earlier
conversations, so the asked rate is kept whatever the scores' distribution; each role gets half of
it. That takes 2 / rate - 1 conversations, 1 / rate - 1 of them with the role.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Final

import numpy as np

from schemas.records import STEPS_PER_UNIT, Int32s, Role
from transforms.ranges.fitted import Fitted, Integers, ScoreRule
from transforms.ranges.policies.base import PolicySettings
from transforms.ranges.ranges import Ranges

BOUND_QUANTILE: Final = 0.90
TOGETHER: Final = 10
LENGTH_WEIGHT: Final = 0.03
LENGTH_ORIGIN: Final = 64


def budget_score(excess: Int32s, tokens: Integers) -> Integers:
    """Score of a role by the module's rule. Shapes as `ScoreRule.score`."""
    together = min(TOGETHER, excess.shape[1])
    largest = np.partition(excess, -together, axis=1)[:, -together:]
    # Rounded here once, so that everything after the logarithm is exact on every machine.
    length = np.rint(LENGTH_WEIGHT * STEPS_PER_UNIT * np.log2(tokens / LENGTH_ORIGIN))
    positive = np.maximum(largest, 0).sum(axis=1, dtype=np.int64)
    return largest.max(axis=1) + positive // 2 - length.astype(np.int64)


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """Bounds are 90th percentiles; thresholds keep the asked rate, shared out over the roles."""

    name: ClassVar[str] = "budget"
    version: ClassVar[int] = 1
    keeps_scores: ClassVar[bool] = True

    settings: PolicySettings

    @property
    def asked_rate(self) -> float:
        """See `Policy.asked_rate`."""
        return self.settings.rate

    def fit(self, ranges: Ranges) -> Fitted:
        """See `Policy.fit`."""
        user, assistant = (self._threshold(ranges, role) for role in Role)
        known = ranges.counts.conversations > 0
        return Fitted(
            ranges.counts.quantile(BOUND_QUANTILE),
            (bool(known[Role.USER]), bool(known[Role.ASSISTANT])),
            (user, assistant),
            ScoreRule(budget_score, most_named=TOGETHER),
        )

    def _threshold(self, ranges: Ranges, role: Role) -> int | None:
        if ranges.counts.conversations[role] == 0:
            return None
        # By way of its decimal form 0.01 is a hundredth, not the float next to it.
        rate = Fraction(str(self.settings.rate))
        return ranges.scores.conformal_threshold(role, rate / len(Role), rate)


SCORE_RULE: Final = f"{BudgetPolicy.name}/{BudgetPolicy.version}"
"""What the scores in ranges are made by; scores of another rule say nothing about this one's."""
