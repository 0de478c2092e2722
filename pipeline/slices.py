"""The loop of `watch` and `audit`: plan a slice, run it, commit it, go on.

A slice is fixed by its plan before it is read, so a run that dies is run again and gives the
same verdicts; the commit makes its outcome the truth.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import collect, publish, report, runner
from pipeline.job import Job, Model
from pipeline.learning import frozen
from pipeline.metrics import SLICE_SECONDS
from pipeline.runner import Counts
from pipeline.state import State
from schemas.acts import Act
from schemas.commit import UNNAMED, Commit, Ledger, ModelState
from schemas.errors import ConfigurationError, RunFailedError, TransientError
from schemas.plan import PartitionId, Plan
from transforms.judge import JudgeStart
from transforms.logs import planner
from transforms.logs.open import Logs
from transforms.ranges.policies import Missing
from transforms.ranges.ranges import Ranges

TARGET_SECONDS = 10
"""How long a slice's run should take: its alerts leave at its end."""

FIRST_SLICE_RECORDS = 50
"""Before a speed is known."""


class Slices:
    """Runs a job slice by slice on a state directory."""

    def __init__(
        self,
        job: Job,
        state: State,
        *,
        paced: bool = False,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 10**6,
    ) -> None:
        """Take up where the newest commit left off, finishing what it had begun to archive.

        `paced`: size slices by speed, so that alerts leave every few seconds; without, slices are
        as large as they may be, which scores faster.

        Raises:
          ConfigurationError: the state was made under a configuration that cannot go on here.
        """
        self._job = job
        self._state = state
        self._now_ms = now_ms
        self._logs = Logs(job.inputs, job.kafka_properties)
        self._paced = paced
        self._target = min(FIRST_SLICE_RECORDS, job.slice_records) if paced else job.slice_records
        self.commit = self._with_models(state.newest_commit() or self._first_commit())
        self._check_resumable()
        publish.tell_shifts(job, self.commit)
        publish.finish_epochs(job, state, self.commit)

    def step(self) -> Commit | None:
        """Run the next slice; None when there is nothing to read now.

        Raises:
          RunFailedError: the slice's counts do not add up; nothing was committed.
          TransientError: a log, a sink or the disk fails; take up the state anew and try again.
        """
        with SLICE_SECONDS.labels("plan").time():
            plan = self._begun_plan() or self._next_plan()
        if plan is None:
            return None
        self._state.write_plan(plan)
        started = time.monotonic()
        folder = self._state.fresh_slice_folder(plan.number)
        with SLICE_SECONDS.labels("run").time():
            counts = self._run(plan, folder)
        self._tune(plan, time.monotonic() - started)
        with SLICE_SECONDS.labels("commit").time():
            commit = self._after(plan, folder, counts)
            self._state.write_commit(commit)
        self.commit = commit
        publish.tell_shifts(self._job, commit)
        with SLICE_SECONDS.labels("archive").time():
            publish.finish_epochs(self._job, self._state, commit)
        return commit

    def ranges(self) -> Mapping[str, Ranges]:
        """Per model its ranges of the closed epochs, as the newest commit has them."""
        return {name: self._state.read_ranges(held.ranges_hash) for name, held in self._models()}

    def lags(self) -> Mapping[PartitionId, int]:
        """Per partition the records (bytes, for files) that are not yet committed."""
        return self._logs.remaining(self.commit.progress)

    def missing(self) -> Mapping[str, Missing]:
        """Per model how many conversations it takes until each role can be judged."""
        return {name: self._job.policy.missing(held) for name, held in self.ranges().items()}

    def _first_commit(self) -> Commit:
        nothing = Commit(0, self._job.config_hash, (), None, {}, Ledger(), Ledger(), {}, {})
        return replace(nothing, committed_ms=self._now_ms())

    def _with_models(self, commit: Commit) -> Commit:
        """The commit with all models of the job: one that is new begins with its base ranges."""
        job = self._job
        held = dict((commit if job.routed else commit.called(job.models[0].name)).models)
        if UNNAMED in held:
            raise ConfigurationError(
                f"{self._state.root} holds ranges of one model by an older version, which did not "
                f"name it; start once without [[models]], or give another --state"
            )
        for model in job.models:
            if model.name not in held:
                held[model.name] = self._begun(model)
        return replace(commit, models=held)

    def _begun(self, model: Model) -> ModelState:
        ranges = self._state.write_ranges(model.base_ranges)
        opened = self._state.write_ranges(model.base_ranges.emptied())
        return ModelState(ranges, opened, base_hash=ranges)

    def _models(self) -> Iterator[tuple[str, ModelState]]:
        """The job's models as the newest commit has them."""
        return ((model.name, self.commit.models[model.name]) for model in self._job.models)

    def _check_resumable(self) -> None:
        plan = self._state.pending_plan()
        if plan is not None and plan.config_hash != self._job.config_hash:
            raise ConfigurationError(
                f"{self._state.root} holds a slice begun under another configuration; start once "
                f"with the former one to finish it, or give another --state"
            )
        for stale in (self._input_taken_out(), self._other_epochs(), self._other_length()):
            if stale is not None:
                raise ConfigurationError(f"{self._state.root} {stale}, or give another --state")
        for model in self._job.models:
            self._check_ranges(model, self.commit.models[model.name])
        for name, ranges in self.ranges().items():
            if ranges.directions_hash != self._job.directions[name].hash:
                raise ConfigurationError(
                    f"{self._state.root} holds ranges of other directions for {name}; give another "
                    f"--state"
                )

    def _input_taken_out(self) -> str | None:
        read = {each.id.source for each in self.commit.progress}
        missing = sorted(read - self._logs.sources)
        return f"has begun to read {missing[0]}; give it as --input again" if missing else None

    def _other_epochs(self) -> str | None:
        held = self.commit.epoch_ms
        same = held in (0, self._job.epoch_ms)
        return None if same else f"numbers its epochs by --epoch {held // 1000}s; give that length"

    def _other_length(self) -> str | None:
        held = self.commit.max_tokens
        same = held in (0, self._job.max_tokens)
        return None if same else f"has ranges of {held} tokens; give --max-tokens {held}"

    def _check_ranges(self, model: Model, held: ModelState) -> None:
        given = model.base_ranges
        if held.base_hash not in ("", given.hash) and given.hash != given.emptied().hash:
            raise ConfigurationError(
                f"{self._state.root} began without these --ranges for {model.name} and would not "
                f"use them; leave them out, or give another --state"
            )

    def _begun_plan(self) -> Plan | None:
        """The plan of a run that did not come to its commit, if it can still be read."""
        plan = self._state.pending_plan()
        if plan is None or planner.readable(self._logs, plan):
            return plan
        report.say(f"slice {plan.number} is planned anew: the log has deleted a part of it")
        return None

    def _next_plan(self) -> Plan | None:
        now, closed = self._now_ms(), self.commit.closed_epoch
        progress = planner.discover(self._logs, self.commit.progress, closed, self._job.rules)
        if not self.commit.progress:
            # Where a log begins is asked once: its latest record will be another after a restart.
            self.commit = replace(self.commit, progress=progress)
            self._state.write_commit(self.commit)
        return planner.plan(
            self._logs,
            progress,
            closed,
            self._job.rules,
            self._target,
            number=self.commit.number + 1,
            clock_ms=now,
            config_hash=self._job.config_hash,
            # What people did takes effect between two epochs: nothing is read beyond the open one.
            only_open=bool(self._waiting()),
        )

    def _run(self, plan: Plan, folder: Path) -> Counts:
        if plan.records == 0:
            return Counts()
        path = self._state.ranges_path
        start = JudgeStart(
            plan.closed_before or 0,
            {name: path(held.ranges_hash) for name, held in self._models()},
            {name: path(held.open_hash) for name, held in self._models()},
            plan.complete_through,
            frozenset(name for name, held in self._models() if frozen(held.acts)),
        )
        counts = runner.run(self._job, plan, start, folder)
        SLICE_SECONDS.labels("score").observe(counts.scoring_seconds)
        ledger = counts.ledger
        if ledger.balanced and ledger.seen < plan.records and not planner.holds(self._logs, plan):
            self._state.drop_plan()
            raise TransientError(f"slice {plan.number}: the log has been compacted meanwhile")
        if ledger.seen != plan.records or not ledger.balanced:
            raise RunFailedError(
                f"slice {plan.number} does not add up, nothing of it is committed:"
                f" {plan.records} planned, {ledger}"
            )
        return counts

    def _after(self, plan: Plan, folder: Path, counts: Counts) -> Commit:
        ledger = replace(counts.ledger, lost=plan.lost)
        acts = self._waiting() if plan.ends_an_epoch else []
        models = {
            model.name: self._model_after(model, plan, folder, counts, acts)
            for model in self._job.models
        }
        # What was told of a model that is judged no longer is not told again after every slice.
        former = {name: replace(held, news=()) for name, held in self.commit.models.items()}
        files = collect.pending_files(self.commit.pending, folder, self._state.root)
        return Commit(
            number=plan.number,
            config_hash=plan.config_hash,
            progress=plan.after,
            closed_epoch=plan.closed_after,
            models={**former, **models},
            slice_ledger=ledger,
            total_ledger=self.commit.total_ledger + ledger,
            pending={epoch: paths for epoch, paths in files.items() if not plan.closes(epoch)},
            to_archive={epoch: paths for epoch, paths in files.items() if plan.closes(epoch)},
            reasons=dict(Counter(self.commit.reasons) + Counter(counts.reasons)),
            committed_ms=self._now_ms(),
            epoch_ms=self._job.epoch_ms,
            max_tokens=self._job.max_tokens or 0,
        )

    def _waiting(self) -> list[Act]:
        """What people want done to ranges of the job's models; it waits for others to come back."""
        return self._state.take_acts(self.commit.done, lambda act: self._concerned(act) is not None)

    def _concerned(self, act: Act) -> str | None:
        return self.commit.concerned(act, [model.name for model in self._job.models])

    def _model_after(
        self, model: Model, plan: Plan, folder: Path, counts: Counts, acts: Sequence[Act]
    ) -> ModelState:
        held = self.commit.models[model.name]
        mine = [act for act in acts if self._concerned(act) == model.name]
        after = collect.model_after(held, plan, self._job, model, folder, self._state, mine)
        return replace(after, ledger=held.ledger + counts.by_model.get(model.name, Ledger()))

    def _tune(self, plan: Plan, seconds: float) -> None:
        """Size the next slice by this one's speed, so that its run takes about as long as asked."""
        if self._paced and plan.records:
            wanted = round(plan.records * TARGET_SECONDS / seconds)
            # One slow slice, such as the first with its model to load, is not believed at once.
            damped = max(wanted, self._target // 2)
            self._target = max(1, min(damped, 2 * self._target, self._job.slice_records))
