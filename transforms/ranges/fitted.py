"""Judging conversations by bounds, a score per role and thresholds: the shape of every policy.

A policy, fitted to ranges, is a bound for every series, a rule that makes one score per role of
how far the role's series exceed their bounds, and a threshold per role. A conversation is flagged
when a role's score is above that role's threshold. All arithmetic is on integer steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Exceedance, Int32s, Judgement, Role, Status
from transforms.ranges.series import (
    PER_DIRECTION,
    role_columns,
    roles_present,
    series_at,
    series_of_role,
)

Integers = NDArray[np.signedinteger]
Bools = NDArray[np.bool_]
Thresholds = tuple[int | None, int | None]
"""Per role, in steps; None: the role is not calibrated."""

_LOWEST = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """How the exceedances of a role become its score, and which of them explain it.

    Attributes:
      score: from exceedances int32 [n, 2D] (value minus bound, steps) and the conversations'
        tokens [n] to scores [n] in steps.
      margin_over: an exceedance is named in a judgement when it is larger than this.
      most_named: at most so many are named per role; None: all.
    """

    score: Callable[[Int32s, Integers], Integers]
    margin_over: int = 0
    most_named: int | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A policy fitted to ranges.

    Attributes:
      bounds: of every series in steps, int32 [4D].
      known: whether each role's series have any values to exceed.
      thresholds: per role; None where the role is not calibrated.
      rule: makes scores of exceedances.
    """

    bounds: Int32s
    known: tuple[bool, bool]
    thresholds: Thresholds
    rule: ScoreRule

    def role_scores(self, values: Integers, tokens: Integers) -> Int32s:
        """Score of each role, int32 [n, 2] in steps; ABSENT where it has no tokens or no ranges.

        Args:
          values: of all series in steps, [n, 4D].
          tokens: of each conversation, both roles together, [n].
        """
        excess = np.subtract(values, self.bounds, dtype=np.int32)
        by_role = [self.rule.score(role_columns(excess, role), tokens) for role in Role]
        # No real score may look like ABSENT.
        scores = np.maximum(np.stack(by_role, axis=1), ABSENT + 1)
        scored = roles_present(values) & np.array(self.known)
        return np.where(scored, scores, ABSENT).astype(np.int32)

    def judge(self, values: Integers, tokens: Integers) -> "Judgements":
        """Judge conversations; arguments as for `role_scores`."""
        return Judgements(self, values, self.role_scores(values, tokens))


@dataclass(frozen=True, eq=False)
class Judgements:
    """What a fitted policy says of n conversations.

    Attributes:
      fitted: the policy that judged.
      values: of all series in steps, [n, 4D].
      role_scores: int32 [n, 2] in steps; ABSENT where a role was not scored.
    """

    fitted: Fitted
    values: Integers
    role_scores: Int32s

    @property
    def thresholds(self) -> Thresholds:
        """Per role, in steps; None: the role is not calibrated."""
        return self.fitted.thresholds

    @cached_property
    def over(self) -> Bools:
        """Whether each role's score is above its threshold, bool [n, 2]."""
        scored = self.role_scores != ABSENT
        return scored & self._calibrated & (self.role_scores > self._limits)

    @cached_property
    def flagged(self) -> Bools:
        """Rows with a calibrated role above its threshold, bool [n]."""
        return self.over[:, Role.USER] | self.over[:, Role.ASSISTANT]

    @cached_property
    def uncalibrated(self) -> Bools:
        """Rows not flagged of which a role present is not calibrated, or no role is present."""
        present = roles_present(self.values)
        unsure = (present & ~self._calibrated).any(axis=1) | ~present.any(axis=1)
        return unsure & ~self.flagged

    def status(self, row: int) -> Status:
        """The answer about one conversation."""
        if self.flagged[row]:
            return Status.FLAGGED
        return Status.UNCALIBRATED if self.uncalibrated[row] else Status.CLEAN

    @property
    def absent(self) -> Bools:
        """Roles that could have been scored had they any tokens, bool [n, 2]."""
        return ~roles_present(self.values) & np.array(self.fitted.known)

    def censored_scores(self) -> Int32s:
        """The scores to count, int32 [n, 2]: those of flagged rows held down to the thresholds.

        Left out, they would be missing from the tail and the threshold would sink with every
        epoch. Counted as they are, a flood of flagged conversations would lift the threshold
        above itself. Held down, they keep their place in the tail and can never lift it.
        """
        held = np.minimum(self.role_scores, self._limits)
        hold = self.flagged[:, None] & self._calibrated
        return np.where(hold, held, self.role_scores).astype(np.int32)

    def records(self) -> tuple[Judgement, ...]:
        """One record per conversation.

        The role that decided is the one farthest above its threshold; of a clean conversation,
        the one nearest to it; of one that is not calibrated, the uncalibrated role with the
        highest score. Ties go to USER. Only flagged conversations list exceedances.
        """
        deciding = self._deciding_roles()
        return tuple(self._record(row, int(role)) for row, role in enumerate(deciding))

    def _deciding_roles(self) -> NDArray[np.intp]:
        """Per row the role that decided, -1 for none."""
        candidates = np.where(self.flagged[:, None], self.over, self.role_scores != ABSENT)
        candidates &= ~(self.uncalibrated[:, None] & self._calibrated)
        distance = np.where(candidates, self.role_scores - self._limits, _LOWEST)
        return np.where(candidates.any(axis=1), distance.argmax(axis=1), -1)

    def _record(self, row: int, deciding: int) -> Judgement:
        status = self.status(row)
        if deciding < 0:
            return Judgement(status, None, None, None, ())
        role = Role(deciding)
        score = int(self.role_scores[row, role])
        exceedances = self._exceedances(row) if status is Status.FLAGGED else ()
        return Judgement(status, role, score, self.thresholds[role], exceedances)

    def _exceedances(self, row: int) -> tuple[Exceedance, ...]:
        excess = self.values[row].astype(np.int32) - self.fitted.bounds
        roles = [role for role in Role if self.over[row, role]]
        named = np.concatenate([self._named(excess, role) for role in roles])
        largest_first = named[np.lexsort((named, -excess[named]))]
        return tuple(self._exceedance(row, int(series)) for series in largest_first)

    def _named(self, excess: Int32s, role: Role) -> NDArray[np.intp]:
        """The series of a role that explain its score."""
        series = series_of_role(role, len(excess) // PER_DIRECTION)
        series = series[excess[series] > self.fitted.rule.margin_over]
        largest_first = np.argsort(-excess[series], kind="stable")
        return series[largest_first][: self.fitted.rule.most_named]

    def _exceedance(self, row: int, index: int) -> Exceedance:
        value, bound = int(self.values[row, index]), int(self.fitted.bounds[index])
        series = series_at(index, self.values.shape[1] // PER_DIRECTION)
        return Exceedance(
            series.role,
            series.direction,
            series.side,
            series.cosine(value),
            series.cosine(bound),
            value - bound,
        )

    @cached_property
    def _calibrated(self) -> Bools:
        return np.array([threshold is not None for threshold in self.thresholds])

    @cached_property
    def _limits(self) -> NDArray[np.int64]:
        """Thresholds, 0 where there is none."""
        return np.array([threshold or 0 for threshold in self.thresholds], np.int64)
