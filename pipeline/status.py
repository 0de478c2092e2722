"""The `status` command: what a state directory says of its job, while the job runs or not."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.learning import frozen
from pipeline.state import (
    model_names,
    newest_commit,
    oldest_commit,
    pending_plan,
    policy_of,
    read_ranges,
)
from schemas.artefacts import read_json
from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.commit import Commit, Ledger, ModelState
from schemas.errors import ConfigurationError
from schemas.plan import PartitionProgress
from schemas.records import Role
from transforms.logs.open import Logs
from transforms.ranges.policies import Policy
from transforms.ranges.ranges import Ranges


@dataclass(frozen=True)
class Status:
    """A state directory as it is now; nothing in it is locked or changed."""

    root: Path
    job: Mapping[str, Any]
    commit: Commit
    now: float
    properties: ClientProperties

    @staticmethod
    def of(root: Path, properties: ClientProperties = NOT_SECURED) -> "Status":
        """Read it; `properties` say how the brokers are secured that know the lag.

        Raises:
          ConfigurationError: there is no job's state, or it is of a version that cannot be read.
        """
        commit = newest_commit(root)
        if commit is None or not (root / "job.json").is_file():
            raise ConfigurationError(
                f"{root} holds no commit of a deltawatch; give the --state of `watch` or `audit`"
            )
        return Status(root, read_json(root / "job.json"), commit, time.time(), properties)

    def lines(self) -> Iterator[str]:
        """For a person, the most important first."""
        yield f"{', '.join(self._names)}: policy {self.job['policy']}, {self._asked()}"
        yield self._committed()
        yield from self._calibration()
        yield f"records: {self.commit.total_ledger}"
        yield from self._reasons()
        yield f"flagged: {_flagged(self.commit.total_ledger)}"
        yield from self._flagged_by_model()
        yield from map(self._lag, self.commit.progress)
        yield f"alerts: {self.job['alerts']}  dead letters: {self.job['dead_letters']}"
        yield f"archive: {self.job['archive']}"

    def _asked(self) -> str:
        rate = self._policy.asked_rate
        return "no rate asked for" if rate is None else f"at most {rate:.2%} of normal traffic"

    def _committed(self) -> str:
        seconds = self.commit.committed_ms / 1000
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
        begun = pending_plan(self.root, self.commit)
        running = f"; slice {begun.number} is begun" if begun is not None else ""
        number = self.commit.number
        what = f"slice {number} committed" if number else "no slice committed yet, begun"
        return f"{what} {when}, {self.now - seconds:,.0f} s ago{running}"

    def _calibration(self) -> Iterator[str]:
        for name, held in self._models():
            ranges = read_ranges(self.root, held.ranges_hash)
            missing = self._policy.missing(ranges)
            for role in Role:
                known = "NOT calibrated yet" if missing[role] else "calibrated"
                count = int(ranges.conversations.stretches[role])
                whose = f"{name}, {role.name.lower()}" if self._several else role.name.lower()
                more = self._more(name, missing[role], ranges, role)
                yield f"{whose}: {known}, ranges of {count:,} conversations{more}"
            yield from self._by_hand(name, held, ranges)

    def _more(self, name: str, missing: int, ranges: Ranges, role: Role) -> str:
        """How many conversations it takes, and when they will be there at the present rate."""
        if not missing:
            return ""
        share = int(ranges.conversations.stretches[role]) / max(ranges.conversations.total, 1)
        per_second = self._scored_per_second(name) * share
        when = f"in about {_long(missing / per_second)}" if per_second else "at no known time"
        return f"; {missing:,} more are needed, there {when} at the present rate"

    def _scored_per_second(self, name: str) -> float:
        """Of a model, since the oldest commit that is kept."""
        oldest = oldest_commit(self.root) or self.commit
        before = self._of(oldest).models.get(name)
        now = self._of(self.commit).models[name].ledger.scored
        scored = now - (before.ledger.scored if before else 0)
        return scored / max(self.now - oldest.committed_ms / 1000, 1)

    def _by_hand(self, name: str, held: ModelState, ranges: Ranges) -> Iterator[str]:
        if ranges.without_segments:
            yield (
                f"{name}: {ranges.without_segments:,} conversations were counted by a former "
                "version, without the segments that --policy budget needs"
            )
        if frozen(held.acts):
            yield f"{name}: FROZEN, nothing is learnt; `deltawatch ranges thaw` ends it"
        if held.shift.raised is not None:
            yield (
                f"{name}: RANGE SHIFT, {held.shift.flagged} of {held.shift.judged} conversations "
                f"flagged since epoch {held.shift.since}"
            )

    def _reasons(self) -> Iterator[str]:
        if self.commit.reasons:
            counts = (f"{reason} {n}" for reason, n in sorted(self.commit.reasons.items()))
            yield f"not scored: {', '.join(counts)}"

    def _flagged_by_model(self) -> Iterator[str]:
        for name, held in self._models() if self._several else ():
            yield f"{name}: flagged {_flagged(held.ledger)}"

    def _lag(self, progress: PartitionProgress) -> str:
        logs = Logs([progress.uri], self.properties)
        place = f"{progress.uri} partition {progress.id.partition}"
        lag = logs.remaining([progress])[progress.id]
        return f"{place}: next offset {progress.offset}, lag {lag:,}"

    def _models(self) -> Iterator[tuple[str, ModelState]]:
        """The job's models; those that it had before and has no longer are passed over."""
        commit = self._of(self.commit)
        for name in self._names:
            if name in commit.models:  # one that was added is not before its first slice
                yield name, commit.models[name]

    def _of(self, commit: Commit) -> Commit:
        """A commit with the names that the models have now."""
        return commit if "models" in self.job else commit.called(self._names[0])

    @property
    def _names(self) -> list[str]:
        return model_names(self.job)

    @property
    def _several(self) -> bool:
        return len(self._names) > 1

    @property
    def _policy(self) -> Policy:
        return policy_of(self.job)


def _long(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def _flagged(ledger: Ledger) -> str:
    judged = ledger.scored - ledger.uncalibrated
    return f"{ledger.flagged} of {judged} judged ({ledger.flagged_share:.2%})"
