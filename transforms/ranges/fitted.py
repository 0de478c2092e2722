"""Judging conversations by bounds, a score per stretch and thresholds: the shape of every policy.

A policy, fitted to ranges, is a bound for every series, a rule that makes a score of how far a
stretch's values exceed the bounds of its role, and a threshold per role. A role's score is that of
its highest stretch, less a handicap for how many it has; a conversation is flagged when it is above
that role's threshold. All arithmetic is on integer steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from schemas.records import (
    ABSENT,
    Exceedance,
    Int16s,
    Int32s,
    Judgement,
    Role,
    Segments,
    Side,
    Status,
    UInt8s,
)
from transforms.ranges.scores import BIN_WIDTH, length_of
from transforms.ranges.series import PER_DIRECTION, Series, Stretches, series_at, series_of_role

Integers = NDArray[np.signedinteger]
Bools = NDArray[np.bool_]
Thresholds = tuple[int | None, int | None]
"""Per role, in steps; None: the role is not calibrated."""

_LOWEST = np.iinfo(np.int64).min
_AT_ONCE = 1024  # stretches; bounds the memory that scoring needs


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """How the exceedances of a stretch become its score, and which of them explain it.

    Attributes:
      score: from exceedances int32 [S, 2D] (value minus bound, steps) and the tokens after the
        stretch's start where the values stand, uint8 [S, 2D] (0 in whole ones), to scores [S] in
        steps.
      explains: which exceedances of one stretch its score comes from, bool [2D]; likewise, of [2D].
      most_named: at most so many of these are named per role; None: all.
    """

    score: Callable[[Int32s, UInt8s], Integers]
    explains: Callable[[Int32s, UInt8s], Bools]
    most_named: int | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A policy fitted to ranges.

    Attributes:
      bounds: of every series in steps, int32 [4D].
      known: whether each role's series have enough values to be exceeded.
      thresholds: per role; None where the role is not calibrated.
      rule: makes scores of exceedances.
      handicaps: bins of scores taken off each role's, times its length (see `scores`).
      windows: how far above its threshold, in steps, a role's score still counts as it is.
      whole: whether a stretch is all that a conversation has of a role, not a segment.
    """

    bounds: Int32s
    known: tuple[bool, bool]
    thresholds: Thresholds
    rule: ScoreRule
    handicaps: tuple[int, int] = (0, 0)
    windows: tuple[int, int] = (0, 0)
    whole: bool = False

    def judge(self, segments: Segments) -> "Judgements":
        """Judge conversations, given by their segments."""
        stretches = Stretches.of(segments)
        judged = stretches.whole() if self.whole else stretches
        places = self._places(segments, judged)
        scores = np.concatenate([np.empty(0, np.int32), *self._scores(judged, places)])
        return Judgements(self, segments, stretches, judged, places, scores)

    def bounds_of(self, role: Role) -> Int32s:
        """Bounds of a role's series, int32 [2D], in the order of `series_of_role`."""
        return self.bounds[series_of_role(role, len(self.bounds) // PER_DIRECTION)]

    def _places(self, segments: Segments, judged: Stretches) -> UInt8s:
        if self.whole:
            return np.broadcast_to(np.uint8(0), judged.values.shape)
        return np.concatenate([segments.high_at, segments.low_at], axis=1)

    def _scores(self, stretches: Stretches, places: UInt8s) -> Iterator[Int32s]:
        """Scores of all stretches in their order, in parts."""
        bounds = np.stack([self.bounds_of(role) for role in Role])
        for start in range(0, len(stretches.row), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            excess = np.subtract(stretches.values[part], bounds[stretches.role[part]])
            yield self.rule.score(excess, places[part]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Judgements:
    """What a fitted policy says of n conversations.

    Attributes:
      fitted: the policy that judged.
      segments: of the conversations.
      stretches: one for each segment.
      judged: those that were judged: the same, or whole ones.
      places: tokens after a judged segment's start where its values stand, uint8 [S, 2D]; 0 in
        whole ones.
      scores: of the judged, int32 [S] in steps.
    """

    fitted: Fitted
    segments: Segments
    stretches: Stretches
    judged: Stretches
    places: UInt8s
    scores: Int32s

    @property
    def thresholds(self) -> Thresholds:
        """Per role, in steps; None: the role is not calibrated."""
        return self.fitted.thresholds

    @cached_property
    def highest(self) -> Int32s:
        """Score of each role's highest stretch, int32 [n, 2]; ABSENT: no tokens or no ranges."""
        found = np.full((self.judged.conversations, len(Role)), ABSENT, np.int32)
        # No real score may look like ABSENT.
        scores = np.maximum(self.scores, ABSENT + 1)
        np.maximum.at(found, (self.judged.row, self.judged.role), scores)
        return np.where(self.fitted.known, found, ABSENT)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Of each role's part in the conversation, [n, 2]."""
        stretches = np.zeros(self.highest.shape, np.int64)
        np.add.at(stretches, (self.judged.row, self.judged.role), 1)
        return length_of(stretches)

    @cached_property
    def role_scores(self) -> Int32s:
        """What is held against the thresholds, int32 [n, 2]; ABSENT as in `highest`."""
        lowered = np.maximum(self.highest - self._handicaps, ABSENT + 1)
        return np.where(self.highest != ABSENT, lowered, ABSENT).astype(np.int32)

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
        unsure = (self._present & ~self._calibrated).any(axis=1) | ~self._present.any(axis=1)
        return unsure & ~self.flagged

    def status(self, row: int) -> Status:
        """The answer about one conversation."""
        if self.flagged[row]:
            return Status.FLAGGED
        return Status.UNCALIBRATED if self.uncalibrated[row] else Status.CLEAN

    @property
    def absent(self) -> Bools:
        """Roles that could have been scored had they any tokens, bool [n, 2]."""
        return ~self._present & np.array(self.fitted.known)

    def held(self) -> Int32s:
        """What scores are held down to before they are counted, int32 [n, 2]; ABSENT: they are not.

        Left out, scores above the threshold would be missing from the tail, and it would sink with
        every epoch. Counted as they are, a flood of flagged conversations would lift it above
        itself. Held down to it, they keep their place in the tail and lift nothing. Those just
        above it, as normal traffic's own tail is, count as they are, or it could never rise.
        """
        far = self.over & (self.role_scores > self._limits + np.array(self.fitted.windows))
        return np.where(far, self._limits + self._handicaps, ABSENT).astype(np.int32)

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
        """Of each role above its threshold, those of its highest stretch; largest margin first."""
        found = [each for role in Role if self.over[row, role] for each in self._named(row, role)]
        return tuple(sorted(found, key=_largest_first))

    def _named(self, row: int, role: Role) -> Iterator[Exceedance]:
        """The series of a role that explain its score."""
        mine = np.flatnonzero((self.judged.row == row) & (self.judged.role == role))
        stretch = int(mine[self.scores[mine].argmax()])
        values, bounds = self.judged.values[stretch], self.fitted.bounds_of(role)
        excess = values - bounds
        outside = np.flatnonzero(self.fitted.rule.explains(excess, self.places[stretch]))
        largest_first = outside[np.argsort(-excess[outside], kind="stable")]
        series = series_of_role(role, len(self.fitted.bounds) // PER_DIRECTION)
        for column in largest_first[: self.fitted.rule.most_named].tolist():
            of = series_at(int(series[column]), len(self.fitted.bounds) // PER_DIRECTION)
            yield self._exceedance(stretch, of, int(values[column]), int(bounds[column]))

    def _exceedance(self, stretch: int, of: Series, value: int, bound: int) -> Exceedance:
        cosine = of.cosine(value)
        token = self._token(stretch, of, cosine)
        return Exceedance(
            of.role, of.direction, of.side, cosine, of.cosine(bound), value - bound, token
        )

    def _token(self, stretch: int, of: Series, cosine: int) -> int:
        """Position of the first token of a stretch that has a series' extreme."""
        segments, judged = self.segments, self.judged
        if self.fitted.whole:
            own = (segments.row == judged.row[stretch]) & (segments.role == of.role)
            among = np.flatnonzero(own)
        else:
            among = np.array([stretch])
        at = segments.high_at if of.side is Side.HIGH else segments.low_at
        found = among[_column(segments, of)[among] == cosine][0]
        return int(segments.start[found]) + int(at[found, of.direction])

    @cached_property
    def _handicaps(self) -> NDArray[np.int64]:
        """In steps, [n, 2]."""
        return self.lengths * np.array(self.fitted.handicaps) * BIN_WIDTH

    @cached_property
    def _present(self) -> Bools:
        return self.judged.present()

    @cached_property
    def _calibrated(self) -> Bools:
        return np.array([threshold is not None for threshold in self.thresholds])

    @cached_property
    def _limits(self) -> NDArray[np.int64]:
        """Thresholds, 0 where there is none."""
        return np.array([threshold or 0 for threshold in self.thresholds], np.int64)


def _largest_first(exceedance: Exceedance) -> tuple[int, bool, int, int]:
    low = exceedance.side is Side.LOW
    return -exceedance.margin, low, exceedance.role, exceedance.direction


def _column(segments: Segments, of: Series) -> Int16s:
    """Extremes of a direction on one side, of all segments."""
    return (segments.high if of.side is Side.HIGH else segments.low)[:, of.direction]
