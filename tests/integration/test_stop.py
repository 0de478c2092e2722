"""Being told to stop: in order the first time, at once the second."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import pytest
import traffic
from cheap_job import CheapEngine, cheap_job
from cheap_scorer import CheapScorer
from numpy.typing import NDArray

from pipeline.follow import Follow
from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State, newest_commit
from schemas.records import Int32s, Segments
from transforms.logs.times import EventTime

CONVERSATIONS = 60
SLICE = 20


class SlowScorer(CheapScorer):
    """As cheap, not as fast."""

    def __init__(self, directions: int, seconds: float) -> None:
        super().__init__(directions)
        self._seconds = seconds

    def score(
        self, token_ids: Sequence[Int32s], roles: Sequence[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Score after a while."""
        time.sleep(self._seconds)
        return super().score(token_ids, roles)


@dataclass(frozen=True, repr=False)
class SlowEngine(CheapEngine):
    """An engine whose batches take their time."""

    seconds: float = 0.0

    def __repr__(self) -> str:
        """Be told apart by what is scored, not by how fast: a restart may be faster."""
        return f"SlowEngine({self.base})"

    def scorer(self) -> SlowScorer:
        """Scores slowly."""
        return SlowScorer(self.directions, self.seconds)


@pytest.fixture
def slow(base_model: Path, conversations: list[dict[str, Any]], tmp_path: Path) -> Job:
    """A job each slice of which takes 4 s."""
    files = traffic.to_files(tmp_path / "log", traffic.records(conversations[:CONVERSATIONS]))
    return cheap_job(
        base_model,
        (files,),
        tmp_path / "out",
        engine=SlowEngine(base_model, seconds=4),
        event_time=EventTime(traffic.TIME_FIELD),
        slice_records=SLICE,
        batch_tokens=10**6,
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def watch(slow: Job, state: Path) -> Iterator[BaseProcess]:
    """`slow` in a process of its own, in the middle of its first slice."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=(slow, state))
    process.start()
    until(lambda: (state / "plan.json").exists(), 120)
    yield process
    process.kill()
    process.join()


def run(job: Job, folder: Path) -> None:
    loop = Follow(True, 60)
    loop.stop_on_signals()
    state = State(folder)
    loop.run(lambda: Slices(job, state))


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_signal_ends_it_after_the_slice_at_hand(watch: BaseProcess, state: Path) -> None:
    watch.terminate()
    watch.join(30)
    assert watch.exitcode == 0
    commit = newest_commit(state)
    assert commit is not None
    assert (commit.number, commit.total_ledger.seen) == (1, SLICE)


def test_the_second_ends_it_at_once_and_nothing_is_lost(
    watch: BaseProcess, slow: Job, state: Path, base_model: Path, tmp_path: Path
) -> None:
    watch.terminate()
    time.sleep(0.5)
    assert watch.is_alive()
    assert newest_commit(state).number == 0
    watch.terminate()
    watch.join(1)
    assert watch.exitcode == -signal.SIGTERM
    assert (state / "plan.json").exists()

    (model,) = slow.models
    fast = replace(slow, models=(replace(model, engine=SlowEngine(base_model)),))
    ended = outcome.run(fast, state)
    total = CONVERSATIONS + traffic.SKIPPED + sum(traffic.DEAD.values())
    assert ended.commit.total_ledger.seen == total
    whole = replace(fast, archive=tmp_path / "whole", alerts=str(tmp_path / "whole.jsonl"))
    undisturbed = outcome.run(whole, tmp_path / "another-state")
    assert ended.files() == undisturbed.files() != {}
    assert ended.ranges.hash == undisturbed.ranges.hash
