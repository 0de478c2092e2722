"""A shift of traffic reaches the alerts, whatever happens to the job."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import traffic
from cheap_job import MODEL, SETTINGS, cheap_job

from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State
from transforms.delivery.sinks import DeliveryError
from transforms.logs.times import EventTime
from transforms.ranges.policies import make_policy

EPOCH_MS = 60_000


@pytest.fixture
def job(
    conversations: list[dict[str, Any]],
    base_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Job:
    """A job whose first flagged conversation is taken for a shift."""
    monkeypatch.setattr("transforms.ranges.shift.LIMIT", 1)
    monkeypatch.setattr("transforms.ranges.shift.FAR", 0)
    log = traffic.to_files(tmp_path / "log", traffic.records(conversations[:300]))
    return cheap_job(
        base_model,
        (log,),
        tmp_path,
        event_time=EventTime(traffic.TIME_FIELD),
        epoch_ms=EPOCH_MS,
        slice_records=40,
        policy=make_policy("budget", replace(SETTINGS, rate=0.1)),
    )


def told(job: Job) -> list[dict[str, Any]]:
    lines = Path(job.alerts).read_text().splitlines() if Path(job.alerts).exists() else []
    events = [json.loads(line) for line in lines]
    return [event for event in events if event["unmapped"].get("event") == "range_shift"]


def test_it_is_told_once_and_after_a_crash_under_the_same_id(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(tmp_path / "state")
    slices = Slices(job, state)
    while slices.commit.models[MODEL].shift.raised is None:
        assert slices.step()
    (event,) = told(job)
    shift, closed = slices.commit.models[MODEL].shift, slices.commit.closed_epoch
    assert closed is not None
    assert shift.raised is not None
    assert event["time"] == (shift.raised + 1) * EPOCH_MS
    flagged = event["unmapped"]["flagged"]
    assert flagged == shift.flagged == slices.commit.total_ledger.alerts - still_open(slices, state)
    assert event["resources"][0]["name"] == MODEL
    Slices(job, state)
    again = told(job)
    assert [each["metadata"]["uid"] for each in again] == [event["metadata"]["uid"]] * 2
    while slices.step():
        pass
    assert len(told(job)) == 2, "while it lasts no more is said"
    assert slices.commit.total_ledger.balanced, "they are no alerts about conversations"
    state.close()


def still_open(slices: Slices, state: State) -> int:
    """Flagged in the epoch that is open, so not summed up yet."""
    held = slices.commit.models.values()
    return sum(state.read_ranges(each.open_hash).flagged for each in held)


def test_it_is_told_later_where_the_alerts_cannot_be_reached(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away:
        def send(self, *_: Any) -> None:
            raise DeliveryError("away")

    state = State(tmp_path / "state")
    slices = Slices(job, state)
    with monkeypatch.context() as patched, pytest.raises(DeliveryError):
        patched.setattr("pipeline.publish.open_sink", lambda *_: Away())
        while slices.step():
            pass
    assert not told(job)
    Slices(job, state)
    assert len(told(job)) == 1
    state.close()
