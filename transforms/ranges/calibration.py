"""Ranges from a set of normal conversations, with scores as if each had come later."""

from collections.abc import Iterator
from functools import reduce
from typing import Final

from transforms.ranges.counts import Counts
from transforms.ranges.fitted import Integers
from transforms.ranges.policies import PolicySettings
from transforms.ranges.policies.budget import BudgetPolicy
from transforms.ranges.ranges import Ranges
from transforms.ranges.scores import ScoreCounts
from transforms.ranges.series import PER_DIRECTION

FOLDS: Final = 5
_ROWS_AT_ONCE: Final = 1024  # bounds the memory that judging needs


def calibrate(
    values: Integers, tokens: Integers, directions_hash: str, model: str, folds: int = FOLDS
) -> Ranges:
    """Count conversations, and their scores under the counts of the others.

    A conversation judged by ranges it is part of looks too harmless. So row i is in fold
    i mod `folds`, and a fold is scored by the counts of the other folds (cross-fitting).

    Args:
      values: of all series in steps, [n, 4D].
      tokens: of each conversation, [n].
      directions_hash: of the directions artefact.
      model: name of the monitored model.
      folds: at least 2.
    """
    rows = [slice(fold, None, folds) for fold in range(folds)]
    empty = Counts.empty(values.shape[1] // PER_DIRECTION)
    counts = [empty.plus(values[fold]) for fold in rows]
    scores = ScoreCounts.empty()
    for fold, mine in enumerate(rows):
        others = reduce(Counts.merged, counts[:fold] + counts[fold + 1 :])
        fitted = BudgetPolicy(PolicySettings()).fit(
            Ranges(directions_hash, model, others, ScoreCounts.empty())
        )
        for part in _parts(len(values[mine])):
            judged = fitted.judge(values[mine][part], tokens[mine][part])
            scores = scores.plus(judged.role_scores, judged.absent)
    return Ranges(directions_hash, model, reduce(Counts.merged, counts), scores)


def _parts(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield slice(start, start + _ROWS_AT_ONCE)
