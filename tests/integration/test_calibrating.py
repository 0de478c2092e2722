"""A calibration that does not come to its end at once: what may be gone on with, and what not."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cheap_job import cheap_job
from kafka import KafkaProducer

from pipeline import calibrating, runner
from pipeline.calibrating import NEVER
from pipeline.demo.broker import Broker
from pipeline.job import Job
from pipeline.preflight import ONE_EPOCH_MS
from pipeline.state import State
from schemas.commit import Commit
from schemas.errors import ConfigurationError, RunFailedError
from transforms.ranges.policies import PolicySettings, make_policy

GOOD = b'{"messages": [{"role": "user", "content": "Hello"}]}'


@pytest.fixture
def job(broker: Broker, base_model: Path, tmp_path: Path) -> Job:
    """Over a topic of five records that is named as the test's folder is."""
    broker.create_topic(tmp_path.name)
    produce(broker, tmp_path.name, 5)
    return calibration(broker, base_model, tmp_path)


def calibration(broker: Broker, base_model: Path, out: Path) -> Job:
    log = f"kafka://{broker.bootstrap}/{out.name}?end=latest"
    policy = make_policy("range", PolicySettings(min_calibration=NEVER))
    return cheap_job(base_model, (log,), out, epoch_ms=ONE_EPOCH_MS, policy=policy, slice_records=3)


def produce(broker: Broker, topic: str, count: int) -> None:
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        for _ in range(count):
            producer.send(topic, GOOD)


def scored(job: Job, folder: Path) -> Commit:
    state = State(folder)
    try:
        return calibrating._scored(job, state, 60)
    finally:
        state.close()


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_what_came_after_the_end_is_left_alone(
    job: Job, broker: Broker, base_model: Path, tmp_path: Path
) -> None:
    """The process was killed when all was scored, before the ranges were written."""
    first = scored(job, tmp_path / "state")
    produce(broker, tmp_path.name, 4)
    again = calibration(broker, base_model, tmp_path)  # asks for the end anew
    assert scored(again, tmp_path / "state") == first
    assert first.total_ledger.seen == first.total_ledger.scored == 5


@pytest.mark.usefixtures("handlers")
def test_other_options_are_refused(job: Job, tmp_path: Path) -> None:
    scored(job, tmp_path / "state")
    with pytest.raises(ConfigurationError, match="a calibration that was begun with other options"):
        scored(replace(job, max_tokens=90), tmp_path / "state")


@pytest.mark.usefixtures("handlers")
def test_a_signal_ends_it_after_the_slice_at_hand(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner.run

    def told_to_stop(*arguments: object) -> runner.Counts:
        os.kill(os.getpid(), signal.SIGTERM)
        return run(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "run", told_to_stop)
        with pytest.raises(RunFailedError, match="the same command goes on from there"):
            scored(job, tmp_path / "state")
    state = State(tmp_path / "state")
    commit = state.newest_commit()
    state.close()
    assert commit is not None
    assert (commit.number, commit.total_ledger.seen) == (1, 3)
    assert scored(job, tmp_path / "state").total_ledger.seen == 5
