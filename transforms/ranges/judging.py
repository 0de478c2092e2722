"""Judging a pack: the step between the policy's arrays and the records around them."""

from schemas.records import ScoredPack, VerdictPack
from transforms.ranges.counting import count
from transforms.ranges.policies import Fitted, Policy, label
from transforms.ranges.ranges import Ranges


class Judge:
    """Applies a policy to packs, fitting it anew only when the closed ranges change."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._fitted: tuple[str, Fitted] | None = None

    def judge(self, pack: ScoredPack, closed: Ranges, opened: Ranges) -> tuple[VerdictPack, Ranges]:
        """Judge a pack against closed ranges.

        Args:
          pack: conversations of one model and epoch.
          closed: ranges of the epochs before the pack's.
          opened: what is counted so far in the pack's epoch.

        Returns:
          The verdicts, and `opened` with the pack counted in.
        """
        fitted = self._fit(closed)
        judgements = fitted.judge(pack.segments)
        user, assistant = closed.conversations.stretches.tolist()
        verdicts = VerdictPack(
            pack, judgements.records(), label(self._policy), closed.hash, (user, assistant)
        )
        return verdicts, count(self._policy, opened, judgements)

    def _fit(self, closed: Ranges) -> Fitted:
        if self._fitted is None or self._fitted[0] != closed.hash:
            self._fitted = (closed.hash, self._policy.fit(closed))
        return self._fitted[1]
