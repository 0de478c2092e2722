"""A record that gets lost anywhere in the job must make the run fail, with nothing committed."""

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traffic
from cheap_job import DIRECTIONS, MODEL, cheap_directions, cheap_job
from extremes import segments_from
from outcome import run

from pipeline.job import Job
from pipeline.state import State
from schemas.errors import RunFailedError
from transforms import alerts, decode, deliver, read, score, skipped, tokenize
from transforms.archive import rows
from transforms.logs.times import EventTime
from transforms.ranges.calibration import calibrate
from transforms.ranges.ranges import Ranges


@pytest.fixture
def job(conversations: list[dict[str, Any]], base_model: Path, tmp_path: Path) -> Job:
    """A job on a hundred conversations, all to be flagged, and the broken ones: one slice."""
    log = traffic.to_files(tmp_path / "log", traffic.records(conversations[:100]))
    nothing = [0] * DIRECTIONS
    silence = segments_from([[(0, nothing, nothing), (1, nothing, nothing)]] * 150, DIRECTIONS)
    empty = Ranges.empty(DIRECTIONS, cheap_directions().hash, MODEL)
    ranges = calibrate(lambda: [(np.arange(150), silence)], empty)
    return cheap_job(
        base_model,
        (log,),
        tmp_path,
        event_time=EventTime(traffic.TIME_FIELD),
        epoch_ms=10**14,
        base_ranges=ranges,
    )


def but_the_third(original: Callable[..., Any]) -> Callable[..., Any]:
    """A generator that gives nothing the third time it is called."""
    calls = iter(range(10**9))

    @wraps(original)
    def process(*args: Any, **named: Any) -> Iterator[Any]:
        if next(calls) != 2:
            yield from original(*args, **named)

    return process


def without_the_third(original: Callable[..., Any]) -> Callable[..., Any]:
    """A generator that keeps the third of what it should give to itself."""

    @wraps(original)  # Beam looks at the signature
    def process(*args: Any, **named: Any) -> Iterator[Any]:
        for number, item in enumerate(original(*args, **named)):
            if number != 2:
                yield item

    return process


def without_a_row(original: Callable[..., Any]) -> Callable[..., Any]:
    """A table that lacks a row."""
    return lambda *args, **named: original(*args, **named).slice(1)


LOSSES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "handing on what was read": (read._ReadPartition, "process", without_the_third),
    "decoding": (decode, "_decoded", but_the_third),
    "tokenising": (tokenize._TokenizeAhead, "finish_bundle", without_the_third),
    "scoring": (score._Pack, "process", but_the_third),
    "archiving": (rows, "conversations_table", without_a_row),
    "describing an alert": (alerts._Describe, "process", without_the_third),
    "sending": (deliver._Send, "process", but_the_third),
    "skipping": (skipped, "_count", lambda original: lambda each: each),
}


@pytest.mark.parametrize("where", LOSSES)
def test_a_lost_record_fails_the_run(
    where: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, losing = LOSSES[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, losing(getattr(place, name)))
        with pytest.raises(RunFailedError, match="does not add up"):
            run(job, tmp_path / "state")
    state = State(tmp_path / "state")
    assert state.newest_commit().number == 0, "where the log begins, and nothing more"
    assert state.pending_plan() is not None
    assert not list(job.archive.rglob("*.parquet"))
    state.close()
    ledger = run(job, tmp_path / "state").commit.total_ledger
    assert ledger.seen == 110
    assert ledger.scored == ledger.flagged == ledger.alerts == 100
