"""What judged conversations add to the counts of their epoch."""

from transforms.ranges.fitted import Judgements
from transforms.ranges.policies import Policy
from transforms.ranges.ranges import Ranges


def count(policy: Policy, opened: Ranges, judgements: Judgements) -> Ranges:
    """Add judged conversations to the open counts.

    A flagged conversation does not widen any series, or the same input would be flagged once and
    then never again.

    Args:
      policy: the one that judged.
      opened: counts of the conversations' epoch so far.
      judgements: of the conversations.
    """
    counted = opened.plus(judgements.stretches.of_conversations(~judgements.flagged))
    counted = counted.plus_verdicts(
        int((~judgements.uncalibrated).sum()), int(judgements.flagged.sum())
    )
    if not policy.keeps_scores:
        return counted
    return counted.plus_scores(
        judgements.highest, judgements.lengths, judgements.absent, judgements.held()
    )
