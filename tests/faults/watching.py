"""`watch` with the cheap scorer, in a process of its own that marks where it is.

Forked, not started: the imports of a job take seconds, and a kill test starts it many times.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import cheap_scorer
import marks as phases
import outcome
from marks import Marks

from pipeline import publish, slices
from pipeline.follow import Follow
from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State, newest_commit
from schemas.commit import Commit, Ledger
from transforms.archive import files
from transforms.delivery import sinks
from transforms.logs.kafka import KafkaLog
from transforms.model import trunk

PATIENCE_S = 240
STUCK_S = 400
"""Longer without a commit than any fault lasts: who waits longer waits for ever."""

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Watch:
    """A job on a state directory.

    Attributes:
      job: what runs.
      state: its directory.
      marks: where it is.
      paced: whether its slices are sized by its speed.
    """

    job: Job
    state: Path
    marks: Marks
    paced: bool

    @contextmanager
    def running(self) -> Iterator[BaseProcess]:
        """A process that watches; killed at the end if it still lives."""
        process = _FORK.Process(target=self._run, daemon=True)
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def until(self, done: Callable[[], bool], process: BaseProcess, every_s: float = 0.05) -> None:
        """Wait for what a living job brings about; AssertionError where it will not come."""
        since, number = time.monotonic(), self.number
        while not done():
            if self.number > number:
                since, number = time.monotonic(), self.number
            assert process.is_alive(), f"the job ended by itself, exit status {process.exitcode}"
            assert time.monotonic() - since < STUCK_S, f"nothing came after {self.commit}"
            time.sleep(every_s)

    def until_next_commit(self, process: BaseProcess) -> float:
        """Seconds until there is a commit that is not there yet."""
        started, number = time.monotonic(), self.number
        self.until(lambda: self.number > number, process, 0.02)
        return time.monotonic() - started

    def finish(self, records: int) -> "outcome.Outcome":
        """Watch until everything has been seen, then stop in order."""
        self.marks.aim(phases.PLANNING, 1)
        with self.running() as process:
            self.until(lambda: self.marks.rings(1), process)  # before, signals end it at once
            self.until(lambda: self.seen >= records and not self._pending(), process)
            process.terminate()
            process.join(60)
            assert process.exitcode == 0, f"exit status {process.exitcode}"
        state = State(self.state)
        ranges = Slices(self.job, state).ranges()
        state.close()
        assert self.commit is not None
        return outcome.Outcome(self.job, self.commit, ranges)

    @property
    def commit(self) -> Commit | None:
        """The newest one."""
        return newest_commit(self.state)

    @property
    def number(self) -> int:
        """That of the newest commit; 0 where there is none."""
        return self.commit.number if self.commit else 0

    @property
    def seen(self) -> int:
        """Records of all commits, those that were deleted unread included."""
        total = self.commit.total_ledger if self.commit else Ledger()
        return total.seen + total.lost

    def _pending(self) -> bool:
        """Whether rows are not in the archive yet."""
        return any((self.state / "pending").rglob("*.parquet"))

    def _run(self) -> None:
        _mark(self.marks)
        loop = Follow(True, PATIENCE_S)
        loop.stop_on_signals()
        state = State(self.state)
        loop.run(lambda: Slices(self.job, state, paced=self.paced))
        state.close()


def _mark(marks: Marks) -> None:
    """Once per process: where the phases are."""
    marks.during(phases.PLANNING, slices.planner, "plan")
    marks.during(phases.RUNNING, Slices, "_run")
    marks.while_iterating(phases.READING, KafkaLog, "read")
    for scorer in (cheap_scorer.CheapScorer, trunk.Scorer):
        marks.during(phases.SCORING, scorer, "score")
    marks.during(phases.WRITING, files, "write_table")
    for step in ("send", "flush"):
        marks.during(phases.SENDING, sinks._KafkaSink, step)
    marks.during(phases.COMMITTING, State, "write_commit")
    marks.during(phases.ARCHIVING, publish, "_finish")
