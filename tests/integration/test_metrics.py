"""Metrics and probes of a real job, read over HTTP by Prometheus' own parser."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import traffic
from cheap_job import cheap_job
from prometheus_client.parser import text_string_to_metric_families

from pipeline import metrics
from pipeline.follow import Follow
from pipeline.job import Job
from pipeline.metrics import Health
from pipeline.slices import Slices
from pipeline.state import State
from schemas.errors import ConfigurationError
from transforms.logs.times import EventTime

CONVERSATIONS = 60
Samples = dict[tuple[str, tuple[str, ...]], float]
"""Values by metric and by its labels' values in the order of the labels' names."""


@pytest.fixture(scope="module")
def finished(
    base_model: Path, conversations: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, Follow]:
    """A job run to its end."""
    folder = tmp_path_factory.mktemp("metrics")
    files = traffic.to_files(folder / "log", traffic.records(conversations[:CONVERSATIONS]))
    event_time = EventTime(traffic.TIME_FIELD)
    job = cheap_job(base_model, (files,), folder / "out", event_time=event_time, slice_records=25)
    state, loop = State(folder / "state"), Follow(False, 1)
    loop.run(lambda: Slices(job, state))
    return job, loop


@pytest.fixture
def served(finished: tuple[Job, Follow], free_port: int) -> Iterator[str]:
    job, loop = finished
    close = metrics.serve(job, loop.health, free_port)
    yield f"http://127.0.0.1:{free_port}"
    close()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scraped(url: str) -> Samples:
    status, text = get(f"{url}/metrics")
    assert status == 200
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_say_what_the_ledger_says(finished: tuple[Job, Follow], served: str) -> None:
    job, loop = finished
    found = scraped(served)
    assert loop.health.commit is not None
    total = loop.health.commit.total_ledger
    outcomes = {
        labels[0]: n for (name, labels), n in found.items() if name == "deltawatch_records_total"
    }
    assert (
        sum(outcomes.values())
        == total.seen
        == CONVERSATIONS + traffic.SKIPPED + sum(traffic.DEAD.values())
    )
    assert outcomes["flagged"] == total.flagged
    assert outcomes["clean"] + outcomes["flagged"] + outcomes["not_calibrated"] == CONVERSATIONS
    for reason, count in traffic.DEAD.items():
        assert found["deltawatch_dead_letters_total", (reason,)] == count
    assert found["deltawatch_skipped_total", ("blank",)] == traffic.SKIPPED
    assert found["deltawatch_tokens_total", ()] == total.tokens
    assert found["deltawatch_asked_rate", ()] == 0.05
    assert found["deltawatch_flagged_share", ()] == total.flagged_share
    assert 0 <= found["deltawatch_last_commit_age_seconds", ()] < 60
    lags = [n for (name, _), n in found.items() if name == "deltawatch_lag"]
    assert lags == [0] * traffic.PARTITIONS
    version = job.description()["tool_version"]
    directions = job.directions["a-model"].hash[:12]
    assert found["deltawatch_info", (directions, "a-model", "budget", version)] == 1


def test_every_phase_of_a_slice_is_timed(served: str) -> None:
    found = scraped(served)
    for phase in ("plan", "run", "score", "commit", "archive"):
        assert found["deltawatch_slice_seconds_count", (phase,)] >= 3
        assert found["deltawatch_slice_seconds_sum", (phase,)] > 0
    score, run = (found["deltawatch_slice_seconds_sum", (phase,)] for phase in ("score", "run"))
    assert score < run


def test_probes_of_a_job_that_goes_well(served: str) -> None:
    assert get(f"{served}/healthz") == (200, "ok\n")
    assert get(f"{served}/readyz") == (200, "ok\n")
    assert get(f"{served}/elsewhere")[0] == 404


def test_a_job_is_not_ready_before_its_first_turn_and_while_it_fails(
    finished: tuple[Job, Follow], free_port: int
) -> None:
    health = Health()
    close = metrics.serve(finished[0], health, free_port)
    url = f"http://127.0.0.1:{free_port}"
    assert get(f"{url}/readyz") == (503, "starting\n")
    assert get(f"{url}/healthz")[0] == 200
    health.failed("the broker is away")
    assert get(f"{url}/readyz") == (503, "the broker is away\n")
    assert scraped(url)["deltawatch_failures_total", ()] == 1
    health.beat -= metrics.HUNG_SECONDS + 1
    assert get(f"{url}/healthz")[0] == 503
    close()


def test_a_port_that_is_taken_is_said_in_one_line(
    finished: tuple[Job, Follow], served: str, free_port: int
) -> None:
    with pytest.raises(ConfigurationError, match=f"--metrics-port {free_port}"):
        metrics.serve(finished[0], Health(), free_port)
