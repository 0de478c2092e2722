"""What policies flag over random splits of clean traffic into calibration and test."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Segments
from transforms.ranges.calibration import calibrate
from transforms.ranges.policies import Fitted, Judgements, PolicySettings, make_policy
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import Stretches

SPLITS: Final = 8
INTERVAL: Final = (2.5, 97.5)
"""Percentiles of the splits that an interval lies between (interpolated, so of few splits nearly
the lowest and the highest)."""

LENGTHS: Final = (0, 80, 160, 1025, 1_000_000)
"""Ends of the classes of conversations by tokens."""

SPARSE: Final = 100
"""A class of fewer conversations says nothing about a rate of 1%."""

ACCEPTED: Final = 200
"""Conversations of a foreign kind that an analyst accepts; of fewer than twice as many, half."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What is asked of a policy."""

    policy: str
    rate: float
    calibration: int

    @property
    def name(self) -> str:
        """As tables have it; `range` and `percentile` know no rate."""
        asked = f", {self.rate:.1%}" if self.policy == "budget" else ""
        return f"{self.policy}{asked}, {self.calibration:,}"


@dataclass(frozen=True)
class Figure:
    """The mean over the splits, and between what the middle 95% of them lie."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Figure":
        """Of one value a split."""
        return Figure(float(np.mean(values)), *map(float, np.percentile(values, INTERVAL)))

    def rounded(self) -> list[float]:
        """As JSON has it: mean, low, high."""
        return [round(value, 5) for value in (self.mean, self.low, self.high)]


Figures = dict[str, Figure]


def measure(clean: Segments, tested: Mapping[str, Segments], case: Case) -> Figures:
    """Flagged shares of the clean conversations left over, and of other sets.

    Args:
      clean: is split at random into calibration and test.
      tested: judged whole in every split; for "triggered" there is an "auc" too.
      case: the policy.

    Returns:
      "clean", "uncalibrated" (of the clean ones), each of `tested`, "auc", and "tokens N-M" for
      classes of length with SPARSE clean conversations or more.
    """
    of_class = length_classes(clean)
    return _over_splits(_split(clean, tested, case, of_class, seed) for seed in range(SPLITS))


def measure_foreign(
    clean: Segments, kinds: Mapping[str, Segments], tested: Mapping[str, Segments], case: Case
) -> dict[str, Figures]:
    """By kind of traffic that calibration never saw, what is flagged before and after `accept`.

    Returns:
      Per kind: "kind", all of it, "kind after", what was not accepted, and "kind alerts", the same
      where only the flagged ones were accepted; "clean" and each of `tested`, likewise.
    """
    return {
        name: _over_splits(_accepted(clean, kind, tested, case, s) for s in range(SPLITS))
        for name, kind in kinds.items()
    }


def length_classes(segments: Segments) -> dict[str, NDArray[np.bool_]]:
    """Which conversations are in which class of tokens; [conversations] each."""
    tokens = np.bincount(segments.row, segments.tokens, segments.conversations)
    classes = itertools.pairwise(LENGTHS)
    return {f"tokens {low}-{high - 1}": (tokens >= low) & (tokens < high) for low, high in classes}


def auc(clean: Doubles, triggered: Doubles) -> float:
    """How often a triggered one is above a clean one; ties count half."""
    ordered = np.sort(clean)
    below = np.searchsorted(ordered, triggered) + np.searchsorted(ordered, triggered, "right")
    return float(below.mean() / (2 * len(ordered)))


def distances(judged: Judgements) -> Doubles:
    """How far above its threshold the farther role is, in steps; -inf: neither is calibrated."""
    limits = np.array([np.inf if limit is None else limit for limit in judged.thresholds])
    scores = np.where(judged.role_scores == ABSENT, -np.inf, judged.role_scores)
    return np.asarray((scores - limits).max(axis=1), np.float64)


def _split(
    clean: Segments,
    tested: Mapping[str, Segments],
    case: Case,
    of_class: Mapping[str, NDArray[np.bool_]],
    seed: int,
) -> dict[str, float]:
    mine, others = _parted(clean.conversations, case.calibration, seed)
    fitted = _policy(case).fit(_calibrated(clean.take(mine)))
    judged = fitted.judge(clean.take(others))
    judged_too = {name: fitted.judge(segments) for name, segments in tested.items()}
    found = {"clean": _share(judged), "uncalibrated": float(judged.uncalibrated.mean())}
    found |= {name: _share(each) for name, each in judged_too.items()}
    if "triggered" in judged_too:
        found["auc"] = auc(distances(judged), distances(judged_too["triggered"]))
    for name, members in of_class.items():
        if members.sum() >= SPARSE:
            found[name] = float(judged.flagged[members[others]].mean())
    return found


def _accepted(
    clean: Segments, kind: Segments, tested: Mapping[str, Segments], case: Case, seed: int
) -> dict[str, float]:
    mine, others = _parted(clean.conversations, case.calibration, seed)
    known, rest = _parted(kind.conversations, min(ACCEPTED, kind.conversations // 2), seed)
    ranges = _calibrated(clean.take(mine))
    before = _policy(case).fit(ranges)
    sets = {"clean": clean.take(others), **tested}
    found = _shares(before, {"kind": kind, **sets})
    alerts = known[before.judge(kind.take(known)).flagged]
    for when, chosen in (("after", known), ("alerts", alerts)):
        group = ranges.emptied().plus(Stretches.of(kind.take(chosen)))
        shares = _shares(
            _policy(case).fit(ranges.accepting(group)), {"kind": kind.take(rest), **sets}
        )
        found |= {f"{name} {when}": share for name, share in shares.items()}
    return found


def _shares(fitted: Fitted, sets: Mapping[str, Segments]) -> dict[str, float]:
    return {name: _share(fitted.judge(each)) for name, each in sets.items()}


def _parted(n: int, first: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    shuffled = np.random.default_rng(seed).permutation(n)
    return shuffled[:first], shuffled[first:]


def _calibrated(segments: Segments) -> Ranges:
    empty = Ranges.empty(segments.low.shape[1], "", "")
    return calibrate(lambda: [(np.arange(segments.conversations), segments)], empty)


def _policy(case: Case) -> Any:
    return make_policy(case.policy, PolicySettings(rate=case.rate, min_calibration=1))


def _share(judged: Judgements) -> float:
    return float(judged.flagged.mean())


def _over_splits(found: Iterable[dict[str, float]]) -> Figures:
    splits = list(found)
    return {name: Figure.of([split[name] for split in splits]) for name in splits[0]}
