"""A job's verdicts in plain Python: sorted lists and dictionaries, one conversation at a time.

Shares the contracts (`schemas`) with the project and nothing that dates, counts, bounds or judges.
What the project promises about its bins is said here a second time, from raw values: a quantile
takes the values of a bin to lie evenly over it, a threshold is the upper end of its bin.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby

import numpy as np

from schemas.records import ABSENT, Exceedance, Judgement, Role, Side, Status

Name = tuple[Role, int, Side]
"""A series: role, direction, side."""

FOLDS = 5
SCORE_BIN = 8


@dataclass(frozen=True)
class Rules:
    """A policy and its settings."""

    policy: str
    rate: float = 0.05
    percentile: float = 95
    min_calibration: int = 30
    eps: int = 328  # steps


@dataclass(frozen=True)
class Entry:
    """An entry of a log: when it was logged, and its values unless it could not be scored."""

    partition: int
    offset: int
    time: int | None  # None: it could not be dated
    low: Sequence[int] | None = None  # [2D], steps; None: a dead letter, or passed over
    high: Sequence[int] | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """What is expected of an entry that was scored."""

    entry: Entry
    effective_time: int
    epoch: int
    late: bool
    judgement: Judgement


@dataclass
class Memory:
    """Raw values of normal traffic; low sides negated, so that every tail is an upper one."""

    values: dict[Name, list[int]]
    scores: dict[Role, list[int]] = field(default_factory=lambda: {role: [] for role in Role})
    without: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    total: int = 0

    @staticmethod
    def of(directions: int) -> "Memory":
        """No traffic yet."""
        return Memory(
            {
                (role, direction, side): []
                for role in Role
                for direction in range(directions)
                for side in Side
            }
        )

    @property
    def directions(self) -> int:
        """D."""
        return len(self.values) // 4

    def count(self, role: Role) -> int:
        """Conversations with tokens of a role."""
        return len(self.values[role, 0, Side.HIGH])

    def add(self, low: Sequence[int], high: Sequence[int]) -> None:
        """Remember a conversation's values."""
        self.total += any(value != ABSENT for value in high)
        for role, direction, side in self.values:
            value = (high if side is Side.HIGH else low)[role * self.directions + direction]
            if value != ABSENT:
                self.values[role, direction, side].append(value if side is Side.HIGH else -value)


class Judge:
    """One conversation at a time."""

    def __init__(
        self,
        rules: Rules,
        bounds: Mapping[Name, int],
        known: Mapping[Role, bool],
        thresholds: Mapping[Role, int | None],
    ) -> None:
        """Judge by given bounds (low sides negated) and thresholds, both in steps."""
        self.rules, self.bounds, self.known, self.thresholds = rules, bounds, known, thresholds
        self.directions = len(bounds) // 4

    def judge(self, low: Sequence[int], high: Sequence[int], tokens: int) -> Judgement:
        """The verdict on values [2D]."""
        present = self.present(high)
        outside = {role: self.outside(role, low, high) for role in present if self.known[role]}
        scores = {role: self.score(found, tokens) for role, found in outside.items()}
        gaps = {
            role: score - threshold
            for role, score in scores.items()
            if (threshold := self.thresholds[role]) is not None
        }
        unsure = [role for role in present if self.thresholds[role] is None]
        flagging = [role for role, gap in gaps.items() if gap > 0]
        if flagging:
            named = [item for role in flagging for item in self._named(outside[role])]
            return self._answer(Status.FLAGGED, gaps, scores, tuple(_sorted(named)))
        if unsure or not present:
            ofthose = {role: scores[role] for role in unsure if role in scores}
            return self._answer(Status.UNCALIBRATED, ofthose, scores, ())
        return self._answer(Status.CLEAN, gaps, scores, ())

    def role_scores(
        self, low: Sequence[int], high: Sequence[int], tokens: int
    ) -> dict[Role, int | None]:
        """Score of every role that can be scored but for want of tokens: then None."""
        present = self.present(high)
        return {
            role: self.score(self.outside(role, low, high), tokens) if role in present else None
            for role in Role
            if self.known[role]
        }

    def present(self, high: Sequence[int]) -> list[Role]:
        """Roles with tokens."""
        return [role for role in Role if high[role * self.directions] != ABSENT]

    def outside(self, role: Role, low: Sequence[int], high: Sequence[int]) -> list[Exceedance]:
        """All series of a role as if outside, with margins that may be negative."""
        found = []
        for direction in range(self.directions):
            column = role * self.directions + direction
            ceiling = self.bounds[role, direction, Side.HIGH]
            floor = -self.bounds[role, direction, Side.LOW]
            top, bottom = int(high[column]), int(low[column])
            found.append(Exceedance(role, direction, Side.HIGH, top, ceiling, top - ceiling))
            found.append(Exceedance(role, direction, Side.LOW, bottom, floor, floor - bottom))
        return found

    def score(self, outside: list[Exceedance], tokens: int) -> int:
        """A role's score."""
        margins = sorted((item.margin for item in outside), reverse=True)
        if self.rules.policy != "budget":
            return margins[0]
        ten = sum(margin for margin in margins[:10] if margin > 0)
        return margins[0] + ten // 2 - round(0.03 * 32767 * math.log2(tokens / 64))

    def _named(self, outside: list[Exceedance]) -> list[Exceedance]:
        if self.rules.policy == "budget":
            return _sorted([item for item in outside if item.margin > 0])[:10]
        return [item for item in outside if item.margin > self.rules.eps]

    def _answer(
        self,
        status: Status,
        by: dict[Role, int],
        scores: dict[Role, int],
        exceedances: tuple[Exceedance, ...],
    ) -> Judgement:
        if not by:
            return Judgement(status, None, None, None, ())
        role = max(by, key=lambda one: (by[one], -one))
        return Judgement(status, role, scores[role], self.thresholds[role], exceedances)


def fit(rules: Rules, memory: Memory) -> Judge:
    """The judge that follows from what was seen before."""
    quantile = {"range": 1.0, "percentile": rules.percentile / 100, "budget": 0.9}[rules.policy]
    bounds = {
        name: _quantile(sorted(raw), quantile, memory.total) for name, raw in memory.values.items()
    }
    known = {role: memory.count(role) > 0 for role in Role}
    return Judge(rules, bounds, known, {role: _threshold(rules, memory, role) for role in Role})


def calibrate(conversations: Sequence[tuple[Sequence[int], Sequence[int], int]], d: int) -> Memory:
    """What `calibrate` remembers: all values, and scores of every fifth by the other four."""
    memory = Memory.of(d)
    for fold in range(FOLDS):
        others = Memory.of(d)
        for number, (low, high, _) in enumerate(conversations):
            if number % FOLDS != fold:
                others.add(low, high)
        judge = fit(Rules("budget"), others)
        for low, high, tokens in conversations[fold::FOLDS]:
            _remember_scores(memory, judge.role_scores(low, high, tokens))
    for low, high, _ in conversations:
        memory.add(low, high)
    return memory


def judge_log(
    entries: Iterable[Entry], epoch_ms: int, rules: Rules, memory: Memory
) -> list[Verdict]:
    """Judge every epoch by what `memory` holds before it, then let the memory have it."""
    dated = sorted(_dated(entries, epoch_ms), key=lambda item: item[1] // epoch_ms)
    verdicts = []
    for epoch, members in groupby(dated, key=lambda item: item[1] // epoch_ms):
        judge = fit(rules, memory)
        found = [_verdict(judge, entry, time, epoch, late) for entry, time, late in members]
        for verdict in found:
            _remember(memory, judge, verdict)
        verdicts += found
    return verdicts


def _dated(entries: Iterable[Entry], epoch_ms: int) -> Iterator[tuple[Entry, int, bool]]:
    """Entries that were scored, with effective time and whether they came late."""
    ordered = sorted(entries, key=lambda entry: (entry.partition, entry.offset))
    for _, members in groupby(ordered, key=lambda entry: entry.partition):
        latest: int | None = None
        for entry in members:
            if entry.time is None:
                continue
            late = latest is not None and entry.time // epoch_ms < latest // epoch_ms
            latest = entry.time if latest is None else max(latest, entry.time)
            if entry.low is not None:
                yield entry, latest, late


def _verdict(judge: Judge, entry: Entry, time: int, epoch: int, late: bool) -> Verdict:
    assert entry.low is not None
    assert entry.high is not None
    return Verdict(entry, time, epoch, late, judge.judge(entry.low, entry.high, entry.tokens))


def _remember(memory: Memory, judge: Judge, verdict: Verdict) -> None:
    entry, flagged = verdict.entry, verdict.judgement.status is Status.FLAGGED
    if judge.rules.policy == "budget":
        scores = judge.role_scores(entry.low, entry.high, entry.tokens)
        _remember_scores(memory, _censored(scores, judge.thresholds) if flagged else scores)
    if not flagged:
        memory.add(entry.low, entry.high)


def _censored(
    scores: Mapping[Role, int | None], thresholds: Mapping[Role, int | None]
) -> dict[Role, int | None]:
    return {
        role: score if score is None or (limit := thresholds[role]) is None else min(score, limit)
        for role, score in scores.items()
    }


def _remember_scores(memory: Memory, scores: Mapping[Role, int | None]) -> None:
    for role, score in scores.items():
        if score is None:
            memory.without[role] += 1
        else:
            memory.scores[role].append(score)


def _threshold(rules: Rules, memory: Memory, role: Role) -> int | None:
    if rules.policy != "budget":
        return rules.eps if memory.count(role) >= rules.min_calibration else None
    scores, without = sorted(memory.scores[role]), memory.without[role]
    rate = Fraction(str(rules.rate))
    if memory.count(role) == 0:
        return None
    overall = math.ceil((len(scores) + without + 1) * (1 - rate / 2)) - without
    k = max(overall, math.ceil((len(scores) + 1) * (1 - rate)))
    return scores[k - 1] // SCORE_BIN * SCORE_BIN + SCORE_BIN - 1 if k <= len(scores) else None


def _quantile(ordered: list[int], q: float, total: int) -> int:
    """Between two order statistics of all conversations, those without a value the lowest.

    At least that of the values alone at 1 - 2 (1 - q); 0 of nothing.
    """
    if not ordered:
        return 0
    among_all = q * (total - 1) - (total - len(ordered))
    place = max(among_all, (1 - 2 * (1 - q)) * (len(ordered) - 1), 0)
    below = math.floor(place)
    lower = _order_statistic(ordered, below)
    upper = _order_statistic(ordered, min(below + 1, len(ordered) - 1))
    return int(np.rint(lower + (place - below) * (upper - lower)))


def _order_statistic(ordered: list[int], rank: int) -> float:
    """The value of a rank as a histogram knows it: evenly spread over its bin, none too large."""
    if rank == len(ordered) - 1:
        return ordered[-1]
    start, width = _bin(ordered[rank])
    sharing = [value for value in ordered if _bin(value) == (start, width)]
    earlier = sum(value < start for value in ordered)
    spread = start - 0.5 + width * (rank - earlier + 0.5) / len(sharing)
    return min(spread, ordered[-1])


def _bin(value: int) -> tuple[int, int]:
    """First value and width of a value's bin: fine from -4,096 on, coarse below."""
    width = 32 if value >= -4096 else 512
    return value // width * width, width


def _sorted(items: list[Exceedance]) -> list[Exceedance]:
    def order(item: Exceedance) -> tuple[int, bool, int, int]:
        return (-item.margin, item.side is Side.LOW, item.role, item.direction)

    return sorted(items, key=order)
