"""What judged conversations add to the counts of their epoch."""

from dataclasses import replace

from transforms.ranges.fitted import Integers, Judgements
from transforms.ranges.policies import Policy
from transforms.ranges.ranges import Ranges


def count(policy: Policy, opened: Ranges, values: Integers, judgements: Judgements) -> Ranges:
    """Add conversations to the open counts.

    A flagged conversation does not widen any series, or the same input would be flagged once and
    then never again.

    Args:
      policy: the one that judged.
      opened: counts of the conversations' epoch so far.
      values: of all series in steps, [n, 4D].
      judgements: of the same n conversations.
    """
    counts = opened.counts.plus(values[~judgements.flagged])
    if not policy.keeps_scores:
        return replace(opened, counts=counts)
    scores = opened.scores.plus(judgements.censored_scores(), judgements.absent)
    return replace(opened, counts=counts, scores=scores)
