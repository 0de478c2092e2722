"""`budget`: flag the conversations whose exceedances, taken together, are too much at a given rate.

A planted behaviour moves dozens of directions of one role a little within a few tokens, other text
moves them here and there. So a segment's score is the sum of its series' exceedances over their
99th percentiles (cosine units) that stand within NEAR tokens, where that sum is largest. A role's
score is that of its highest segment. More segments have more chances, so a handicap for each
doubling of their number is taken off; it is learnt from the scores of earlier conversations. The
threshold of a role is the conformal quantile of these, so the asked rate is kept whatever the
scores' distribution; the roles share it (`BudgetPolicy._share`). That takes 2 / rate - 1
conversations, 1 / rate - 1 of them with the role.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, log
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import SEGMENT_TOKENS, Int32s, Role, UInt8s
from transforms.ranges.fitted import Bools, Fitted, Integers, ScoreRule
from transforms.ranges.policies.base import Missing, PolicySettings, widest
from transforms.ranges.ranges import Ranges
from transforms.ranges.scores import LENGTHS, ScoreCounts, Tally

BOUND_QUANTILE: Final = 0.99
NEAR: Final = 16
"""Tokens within which exceedances are added up, from any multiple of half as many."""

MOST_NAMED: Final = 10
SETTLED: Final = 100
"""Conversations of a role that its bounds need: what exceeds the bounds of fewer says little."""

TAIL: Final = Fraction(3, 4)
"""Handicaps go by this quantile of the scores of a length."""

OF_LENGTH: Final = Fraction(1, 2)
"""How much of the difference between lengths is taken for what length does: long conversations are
about other things than short ones, too."""

ENOUGH: Final = 20
"""Scores of a length that have a say in the handicap."""

BULK: Final = (Fraction(3, 4), Fraction(19, 20))
"""Quantiles of the scores that say how fast their tail falls."""

BEYOND: Final = 4
DEVIATIONS: Final = 3
"""So many standard deviations of a Poisson count are taken for chance."""

GRAIN: Final = 8
"""Handicaps are multiples of so many bins (0.002 in cosine), so that chance hardly moves them."""

_HALF: Final = NEAR // 2
_HALVES: Final = SEGMENT_TOKENS // _HALF


def budget_score(excess: Int32s, places: UInt8s) -> Integers:
    """Score of a segment by the module's rule. Shapes as `ScoreRule.score`."""
    return _near(excess, places).max(axis=1)


def in_score(excess: Int32s, places: UInt8s) -> Bools:
    """Which exceedances make up a segment's score. Shapes as `ScoreRule.explains`."""
    first = int(_near(excess[None], places[None]).argmax())
    half = places // _HALF
    return (excess > 0) & (first <= half) & (half <= first + 1)


def _near(excess: Int32s, places: UInt8s) -> NDArray[np.int64]:
    """Sums of exceedances from each multiple of _HALF tokens on, int64 [S, _HALVES - 1]."""
    segment, series = np.nonzero(excess > 0)
    half = segment * _HALVES + places[segment, series] // _HALF
    # As floats, which hold sums below 2^53 exactly.
    sums = np.bincount(half, excess[segment, series], len(excess) * _HALVES)
    halves = sums.astype(np.int64).reshape(-1, _HALVES)
    return halves[:, :-1] + halves[:, 1:]


def handicap_of(tally: Tally) -> int:
    """How much scores grow with each doubling of the number of segments, in bins, at least 0.

    OF_LENGTH times the slope of the line through the lengths' TAIL quantiles (least squares,
    weighted by how many scores a length has). In whole numbers up to the last step, so that it is
    the same everywhere.
    """
    tails = []
    for length in range(LENGTHS):
        of_length = tally.of_length(length)
        if of_length.n >= ENOUGH:
            rank = np.searchsorted(np.cumsum(of_length.counts), ceil(of_length.n * TAIL))
            tails.append((of_length.n, length, int(of_length.bins[rank])))
    weight = sum(n for n, _, _ in tails)
    if len(tails) < 2:
        return 0
    middle = Fraction(sum(n * length for n, length, _ in tails), weight)
    spread = sum(n * (length - middle) ** 2 for n, length, _ in tails)
    together = sum(n * (length - middle) * tail for n, length, tail in tails)
    return max(GRAIN * round(OF_LENGTH * Fraction(together, GRAIN * spread)), 0)


def window_of(tally: Tally, held: int, expected: Fraction) -> int:
    """How far above a threshold scores are still taken for normal traffic's own tail, in steps.

    If the tail falls exponentially beyond the bulk of the scores, one in BEYOND of those above the
    threshold lies farther. Nothing is taken for it once far more scores than that were held down.

    Args:
      tally: of a role, all of length 0.
      held: how many of them were held down.
      expected: how many are to be above the threshold.
    """
    many = held - expected
    if not tally.n or (many > 0 and many**2 > DEVIATIONS**2 * expected):
        return 0
    inner, outer = (tally.upper_end(max(ceil(tally.n * each), 1)) for each in BULK)
    return round((outer - inner) * log(BEYOND) / log((1 - BULK[0]) / (1 - BULK[1])))


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """Bounds are 99th percentiles; thresholds keep the asked rate, shared out over the roles."""

    name: ClassVar[str] = "budget"
    version: ClassVar[int] = 3
    keeps_scores: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    rule: ClassVar[ScoreRule] = ScoreRule(budget_score, in_score, MOST_NAMED)

    settings: PolicySettings

    @property
    def asked_rate(self) -> float:
        """See `Policy.asked_rate`."""
        return self.settings.rate

    def fit(self, ranges: Ranges) -> Fitted:
        """See `Policy.fit`."""
        known = [ranges.behind_segments(role) >= SETTLED for role in Role]
        # A flood of flagged ones has no say in how scores grow with length.
        user, assistant = (handicap_of(tally) for tally in ranges.scores.kept)
        return Fitted(
            widest(ranges, lambda each: each.segments.quantile(BOUND_QUANTILE)),
            (known[Role.USER], known[Role.ASSISTANT]),
            (
                self._threshold(ranges, Role.USER, user),
                self._threshold(ranges, Role.ASSISTANT, assistant),
            ),
            self.rule,
            (user, assistant),
            (
                self._window(ranges.scores, Role.USER, user),
                self._window(ranges.scores, Role.ASSISTANT, assistant),
            ),
        )

    def missing(self, ranges: Ranges) -> Missing:
        """See `Policy.missing`."""
        user, assistant = (self._missing(ranges, role) for role in Role)
        return user, assistant

    def _missing(self, ranges: Ranges, role: Role) -> int:
        """Those that its bounds lack have no scores; then what `conformal_threshold` asks for."""
        unsettled = max(SETTLED - ranges.behind_segments(role), 0)
        own, absent = ranges.scores.n[role], int(ranges.scores.absent[role])
        among_all, among_own = ceil(len(Role) / self._rate) - 1, ceil(1 / self._rate) - 1
        return unsettled + max(among_all - own - absent, among_own - own, 0)

    def _threshold(self, ranges: Ranges, role: Role, handicap: int) -> int | None:
        if ranges.behind_segments(role) < SETTLED:
            return None
        share = self._share(ranges.scores, role)
        return ranges.scores.conformal_threshold(role, share, self._rate, handicap)

    def _share(self, scores: ScoreCounts, role: Role) -> Fraction:
        """A role's part of the rate: half, and the assistant's what the user's cannot use of it.

        Of 500 conversations 2 and 3 may be above, so that both roles together are nearer to 1%.
        """
        outcomes = scores.n[role] + int(scores.absent[role]) + 1
        half = self._rate / len(Role)
        users = floor(outcomes * half)
        if role is Role.USER or not users:
            return half
        return Fraction(floor(outcomes * self._rate) - users, outcomes)

    def _window(self, scores: ScoreCounts, role: Role, handicap: int) -> int:
        conversations = scores.n[role] + int(scores.absent[role])
        expected = self._rate / len(Role) * conversations
        return window_of(scores.of_role(role).lowered(handicap), scores.held[role].n, expected)

    @property
    def _rate(self) -> Fraction:
        # By way of its decimal form 0.01 is a hundredth, not the float next to it.
        return Fraction(str(self.settings.rate))


SCORE_RULE: Final = f"{BudgetPolicy.name}/{BudgetPolicy.version}"
"""What the scores in ranges are made by; scores of another rule say nothing about this one's."""
