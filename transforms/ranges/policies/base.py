"""What a policy is, and the settings any of them may use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from schemas.errors import ConfigurationError
from schemas.records import Int32s
from transforms.ranges.fitted import Fitted, ScoreRule
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import per_series


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Settings of all policies; each uses its own.

    Attributes:
      rate: asked false-positive rate per conversation (`budget`).
      percentile: of the per-conversation extremes (`percentile`).
      min_calibration: conversations of a role needed before it is judged (`range`, `percentile`).
      eps: cosine by which a value may pass its bound (`range`, `percentile`).

    Raises:
      ConfigurationError: a value is out of its range.
    """

    rate: float = 0.01
    percentile: float = 99.9
    min_calibration: int = 1000
    eps: float = 0.01

    def __post_init__(self) -> None:
        allowed = {
            "rate": ("above 0 and below 1", 0 < self.rate < 1),
            "percentile": ("above 0 and at most 100", 0 < self.percentile <= 100),
            "min_calibration": ("at least 1", self.min_calibration >= 1),
            "eps": ("from 0 to 1", 0 <= self.eps <= 1),
        }
        for name, (limits, holds) in allowed.items():
            if not holds:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be {limits}")


Missing = tuple[int, int]
"""Conversations with a user, with an assistant; 0: calibrated."""


def widest(ranges: Ranges, bounds_of: Callable[[Ranges], Int32s]) -> Int32s:
    """Bounds [4D] of what is within either: the ranges, or what was accepted beside them.

    Accepted conversations say nothing of a role that none of them has.
    """
    bounds, group = bounds_of(ranges), ranges.accepted
    if group is None:
        return bounds
    counts = group.conversations
    present = per_series(counts.stretches, counts.directions) > 0
    return np.where(present, np.maximum(bounds, bounds_of(group)), bounds)


class Policy(Protocol):
    """Decides about conversations, given ranges.

    Attributes:
      name: as given to `make_policy`.
      version: goes up with any change of the rule; part of every verdict and alert id.
      keeps_scores: whether conversation scores are to be counted into the ranges.
      whole: whether it looks at all that a conversation has of a role at once, not at segments.
      settings: what it was made with.
      rule: makes scores of exceedances.
      asked_rate: the false-positive rate it keeps to; None: it knows none.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    keeps_scores: ClassVar[bool]
    whole: ClassVar[bool]

    @property
    def settings(self) -> PolicySettings:
        """What it was made with."""
        ...

    @property
    def rule(self) -> ScoreRule:
        """Makes scores of exceedances."""
        ...

    @property
    def asked_rate(self) -> float | None:
        """The false-positive rate it keeps to; None: it knows none."""
        ...

    def fit(self, ranges: Ranges) -> Fitted:
        """Bounds and thresholds from ranges of traffic before the one that is to be judged."""
        ...

    def missing(self, ranges: Ranges) -> Missing:
        """How many more conversations with each role it takes until that role is calibrated."""
        ...


def label(policy: Policy) -> str:
    """A policy's name and version, as verdicts carry them."""
    return f"{policy.name}/{policy.version}"
