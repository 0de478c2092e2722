"""Ranges from a set of normal conversations, with scores as if each had come later."""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Final

import numpy as np
from numpy.typing import NDArray

from schemas.records import Segments
from transforms.ranges.policies import PolicySettings
from transforms.ranges.policies.budget import BudgetPolicy
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import Stretches

FOLDS: Final = 5

Parts = Callable[[], Iterable[tuple[NDArray[np.int64], Segments]]]
"""All conversations in parts, each time anew: their numbers in the log, and their segments."""


def calibrate(parts: Parts, empty: Ranges, folds: int = FOLDS) -> Ranges:
    """Count conversations, and their scores under the counts of the others.

    A conversation judged by ranges it is part of looks too harmless. So number i is in fold
    i mod `folds`, and a fold is scored by the counts of the other folds (cross-fitting).

    Args:
      parts: the conversations; read twice.
      empty: ranges of no traffic.
      folds: at least 2.
    """
    counted = [empty] * folds
    for numbers, segments in parts():
        stretches = Stretches.of(segments)
        for fold in range(folds):
            counted[fold] = counted[fold].plus(stretches.of_conversations(numbers % folds == fold))
    policy = BudgetPolicy(PolicySettings())
    fitted = [
        policy.fit(reduce(Ranges.merged, counted[:fold] + counted[fold + 1 :]))
        for fold in range(folds)
    ]
    ranges = reduce(Ranges.merged, counted)
    for numbers, segments in parts():
        for fold in range(folds):
            judged = fitted[fold].judge(segments.take(np.flatnonzero(numbers % folds == fold)))
            ranges = ranges.plus_scores(judged.highest, judged.lengths, judged.absent)
    return ranges
