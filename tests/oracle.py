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

from schemas.records import Exceedance, Judgement, Role, Side, Status

Name = tuple[Role, int, Side]
"""A series: role, direction, side."""

FOLDS = 5
SCORE_BIN = 8
SETTLED = 100
COUNTED = 8


@dataclass(frozen=True)
class Rules:
    """A policy and its settings."""

    policy: str
    rate: float = 0.05
    percentile: float = 95
    min_calibration: int = 30
    eps: int = 328  # steps


@dataclass(frozen=True)
class Segment:
    """Extremes of a run of tokens of one role, in steps, and their positions."""

    role: Role
    start: int
    low: Sequence[int]
    high: Sequence[int]
    low_at: Sequence[int]
    high_at: Sequence[int]

    def extreme(self, direction: int, side: Side) -> tuple[int, int]:
        """The value of a direction on one side, low sides negated, and its position."""
        if side is Side.HIGH:
            return self.high[direction], self.high_at[direction]
        return -self.low[direction], self.low_at[direction]


@dataclass(frozen=True)
class Entry:
    """An entry of a log: when it was logged, and its segments unless it could not be scored."""

    partition: int
    offset: int
    time: int | None  # None: it could not be dated
    segments: Sequence[Segment] | None = None  # None: a dead letter, or passed over
    tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """What is expected of an entry that was scored."""

    entry: Entry
    effective_time: int
    epoch: int
    late: bool
    judgement: Judgement


@dataclass(frozen=True)
class Score:
    """Of a role's highest segment."""

    score: int
    segments: int
    held: int | None = None  # what it counts as, where it was too far above its threshold

    @property
    def counted(self) -> int:
        """What it counts as."""
        return self.score if self.held is None else self.held


@dataclass
class Memory:
    """Raw values of normal traffic; low sides negated, so that every tail is an upper one."""

    segments: dict[Name, list[int]]
    conversations: dict[Name, list[int]]
    scores: dict[Role, list[Score]] = field(default_factory=lambda: {role: [] for role in Role})
    without: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    total: int = 0

    @staticmethod
    def of(directions: int) -> "Memory":
        """No traffic yet."""
        names = [
            (role, number, side) for role in Role for number in range(directions) for side in Side
        ]
        return Memory({name: [] for name in names}, {name: [] for name in names})

    @property
    def directions(self) -> int:
        """D."""
        return len(self.segments) // 4

    def count(self, role: Role) -> int:
        """Conversations with tokens of a role."""
        return len(self.conversations[role, 0, Side.HIGH])

    def add(self, segments: Sequence[Segment]) -> None:
        """Remember a conversation's values."""
        self.total += bool(segments)
        for name in self.segments:
            role, direction, side = name
            values = [each.extreme(direction, side)[0] for each in segments if each.role is role]
            self.segments[name] += _some(values)
            self.conversations[name] += [max(values)] if values else []


def _some(values: Sequence[int]) -> Sequence[int]:
    """All of a few; of more the last of each of so many parts, as equal as they can be."""
    ends = (math.ceil((part + 1) * len(values) / COUNTED) for part in range(COUNTED))
    return values if len(values) <= COUNTED else [values[end - 1] for end in ends]


@dataclass(frozen=True)
class Stretch:
    """Where it starts, and value and position of every direction and side."""

    start: int
    extremes: Mapping[tuple[int, Side], tuple[int, int]]


class Judge:
    """One conversation at a time."""

    def __init__(
        self,
        rules: Rules,
        bounds: Mapping[Name, int],
        known: Mapping[Role, bool],
        thresholds: Mapping[Role, int | None],
        handicaps: Mapping[Role, int],
        windows: Mapping[Role, int],
    ) -> None:
        """Judge by given bounds (low sides negated), thresholds and so on, all in steps."""
        self.rules, self.bounds, self.known, self.thresholds = rules, bounds, known, thresholds
        self.handicaps, self.windows = handicaps, windows
        self.directions = len(bounds) // 4

    def judge(self, segments: Sequence[Segment]) -> Judgement:
        """The verdict on a conversation."""
        present = self.present(segments)
        raw = self.role_scores(segments)
        scores = {
            role: score - self.handicaps[role] * _doublings(count)
            for role, found in raw.items()
            if found is not None
            for score, count in [found]
        }
        gaps = {
            role: score - threshold
            for role, score in scores.items()
            if (threshold := self.thresholds[role]) is not None
        }
        unsure = [role for role in present if self.thresholds[role] is None]
        flagging = [role for role, gap in gaps.items() if gap > 0]
        if flagging:
            named = [item for role in flagging for item in self._named(role, segments)]
            return self._answer(Status.FLAGGED, gaps, scores, tuple(_sorted(named)))
        if unsure or not present:
            ofthose = {role: scores[role] for role in unsure if role in scores}
            return self._answer(Status.UNCALIBRATED, ofthose, scores, ())
        return self._answer(Status.CLEAN, gaps, scores, ())

    def role_scores(self, segments: Sequence[Segment]) -> dict[Role, tuple[int, int] | None]:
        """Score and number of stretches of every role that can be scored; None: no tokens."""
        found: dict[Role, tuple[int, int] | None] = {}
        for role in Role:
            if self.known[role]:
                stretches = self.stretches(role, segments)
                highest = max((self.score(role, each) for each in stretches), default=None)
                found[role] = None if highest is None else (highest, len(stretches))
        return found

    def present(self, segments: Sequence[Segment]) -> list[Role]:
        """Roles with tokens."""
        return [role for role in Role if any(each.role is role for each in segments)]

    def stretches(self, role: Role, segments: Sequence[Segment]) -> list[Stretch]:
        """Of a role: every segment, or all of them as one."""
        keys = [(number, side) for number in range(self.directions) for side in Side]
        apart = [
            Stretch(each.start, {key: each.extreme(*key) for key in keys})
            for each in segments
            if each.role is role
        ]
        if self.rules.policy == "budget" or not apart:
            return apart
        largest = {key: max((each.extremes[key] for each in apart), key=_value) for key in keys}
        return [Stretch(apart[0].start, largest)]

    def outside(self, role: Role, stretch: Stretch) -> list[Exceedance]:
        """All series of a role as if outside, with margins that may be negative."""
        found = []
        for (direction, side), (value, token) in stretch.extremes.items():
            bound = self.bounds[role, direction, side]
            sign = 1 if side is Side.HIGH else -1
            found.append(
                Exceedance(role, direction, side, sign * value, sign * bound, value - bound, token)
            )
        return found

    def score(self, role: Role, stretch: Stretch) -> int:
        """A stretch's score."""
        if self.rules.policy != "budget":
            return max(item.margin for item in self.outside(role, stretch))
        return sum(item.margin for item in self.near(role, stretch))

    def near(self, role: Role, stretch: Stretch) -> list[Exceedance]:
        """Exceedances that stand in those 16 tokens of a segment where they are most in sum."""
        over = [item for item in self.outside(role, stretch) if item.margin > 0]
        windows = [
            [item for item in over if begin <= item.token - stretch.start < begin + 16]
            for begin in range(0, 49, 8)
        ]
        return max(windows, key=lambda window: sum(item.margin for item in window))

    def _named(self, role: Role, segments: Sequence[Segment]) -> list[Exceedance]:
        highest = max(self.stretches(role, segments), key=lambda each: self.score(role, each))
        outside = self.outside(role, highest)
        if self.rules.policy == "budget":
            return _sorted(self.near(role, highest))[:10]
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
    budget = rules.policy == "budget"
    quantile = {"range": 1.0, "percentile": rules.percentile / 100, "budget": 0.99}[rules.policy]
    raw = memory.segments if budget else memory.conversations
    total = None if budget else memory.total
    bounds = {name: _quantile(sorted(values), quantile, total) for name, values in raw.items()}
    known = {role: memory.count(role) >= (SETTLED if budget else 1) for role in Role}
    handicaps = {role: _handicap(memory.scores[role]) if budget else 0 for role in Role}
    thresholds = {role: _threshold(rules, memory, role, handicaps[role]) for role in Role}
    windows = {role: _window(rules, memory, role, handicaps[role]) for role in Role}
    return Judge(rules, bounds, known, thresholds, handicaps, windows)


def calibrate(conversations: Sequence[Sequence[Segment]], d: int) -> Memory:
    """What `calibrate` remembers: all values, and scores of every fifth by the other four."""
    memory = Memory.of(d)
    for fold in range(FOLDS):
        others = Memory.of(d)
        for number, segments in enumerate(conversations):
            if number % FOLDS != fold:
                others.add(segments)
        judge = fit(Rules("budget"), others)
        for segments in conversations[fold::FOLDS]:
            _remember_scores(memory, judge.role_scores(segments))
    for segments in conversations:
        memory.add(segments)
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
            if entry.segments is not None:
                yield entry, latest, late


def _verdict(judge: Judge, entry: Entry, time: int, epoch: int, late: bool) -> Verdict:
    assert entry.segments is not None
    return Verdict(entry, time, epoch, late, judge.judge(entry.segments))


def _remember(memory: Memory, judge: Judge, verdict: Verdict) -> None:
    segments, flagged = verdict.entry.segments, verdict.judgement.status is Status.FLAGGED
    assert segments is not None
    if judge.rules.policy == "budget":
        _remember_scores(memory, judge.role_scores(segments), judge)
    if not flagged:
        memory.add(segments)


def _remember_scores(
    memory: Memory, scores: Mapping[Role, tuple[int, int] | None], judge: Judge | None = None
) -> None:
    for role, found in scores.items():
        if found is None:
            memory.without[role] += 1
        else:
            memory.scores[role].append(_held(role, Score(*found), judge))


def _held(role: Role, found: Score, judge: Judge | None) -> Score:
    if judge is None or (threshold := judge.thresholds[role]) is None:
        return found
    limit = threshold + judge.handicaps[role] * _doublings(found.segments)
    far = found.score > limit + judge.windows[role]
    return Score(found.score, found.segments, limit) if far else found


def _threshold(rules: Rules, memory: Memory, role: Role, handicap: int) -> int | None:
    if rules.policy != "budget":
        return rules.eps if memory.count(role) >= rules.min_calibration else None
    if memory.count(role) < SETTLED:
        return None
    rate, without = Fraction(str(rules.rate)), memory.without[role]
    bins = _bins(memory.scores[role], handicap)
    ranks = len(bins) + without + 1
    above = math.floor(ranks * rate / 2)
    if above and role is Role.ASSISTANT:
        above = math.floor(ranks * rate) - above
    k = max(ranks - above - without, math.ceil((len(bins) + 1) * (1 - rate)))
    return _upper_end(bins[k - 1]) if k <= len(bins) else None


def _bins(scores: Sequence[Score], handicap: int) -> list[int]:
    """Of all scores less handicaps, ascending."""
    return sorted(
        (each.counted - handicap * _doublings(each.segments)) // SCORE_BIN for each in scores
    )


def _upper_end(number: int) -> int:
    return number * SCORE_BIN + SCORE_BIN - 1


def _window(rules: Rules, memory: Memory, role: Role, handicap: int) -> int:
    """Where three of four of what is above a threshold are, if the tail falls as before it."""
    scores = memory.scores[role]
    bins = _bins(scores, handicap)
    expected = Fraction(str(rules.rate)) / 2 * (len(bins) + memory.without[role])
    held = sum(each.held is not None for each in scores)
    if not bins or held > expected + 3 * math.sqrt(expected):
        return 0
    inner = bins[math.ceil(len(bins) * Fraction(3, 4)) - 1]
    outer = bins[math.ceil(len(bins) * Fraction(19, 20)) - 1]
    return round((_upper_end(outer) - _upper_end(inner)) * math.log(4) / math.log(5))


def _handicap(scores: Sequence[Score]) -> int:
    """Steps per doubling: half the slope of the line through the lengths' tails, in 8 bins."""
    by_length: dict[int, list[int]] = {}
    for each in scores:
        if each.held is None:
            by_length.setdefault(_doublings(each.segments), []).append(each.score // SCORE_BIN)
    points = [
        (length, sorted(bins)[math.ceil(Fraction(3, 4) * len(bins)) - 1], len(bins))
        for length, bins in by_length.items()
        if len(bins) >= 20
    ]
    if len(points) < 2:
        return 0
    n = sum(weight for _, _, weight in points)
    sx = sum(w * x for x, _, w in points)
    sy = sum(w * y for _, y, w in points)
    sxx = sum(w * x * x for x, _, w in points)
    sxy = sum(w * x * y for x, y, w in points)
    slope = Fraction(n * sxy - sx * sy, n * sxx - sx * sx)
    return max(round(slope / 2 / 8), 0) * 8 * SCORE_BIN


def _doublings(count: int) -> int:
    """How often 1 can be doubled without passing a number of stretches; at most 11 times."""
    return min(count.bit_length() - 1, 11)


def _value(extreme: tuple[int, int]) -> int:
    return extreme[0]


def _quantile(ordered: list[int], q: float, total: int | None) -> int:
    """Between two order statistics; 0 of nothing.

    With `total`, over all conversations, those without a value the lowest, and at least that of
    the values alone at 1 - 2 (1 - q).
    """
    if not ordered:
        return 0
    place = q * (len(ordered) - 1)
    if total is not None:
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
