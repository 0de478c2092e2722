"""Whole jobs on real conversations, against an oracle, each other's slices and each other's logs.

The model is the deterministic cheap scorer, so that everything can be compared exactly; the
tokenizer, the broker, the graph and the archive are real.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import traffic
from agreement import assert_ranges, exceedance_of, exceedances_of, row_of, row_of_verdict
from cheap_job import DIRECTIONS, SETTINGS, CheapEngine, cheap_job
from outcome import Outcome, Row, run

from pipeline.demo.broker import Broker
from pipeline.job import Job
from schemas.records import Status
from transforms.logs.times import EventTime
from transforms.ranges.policies import make_policy

EPOCH_MS = 60_000
CALIBRATION = 150
CASES = ["budget", "budget from a snapshot", "percentile", "range"]


@pytest.fixture(scope="module")
def records(conversations: list[dict[str, Any]]) -> traffic.Records:
    return traffic.records(conversations)


@pytest.fixture(scope="module")
def topic(broker: Broker, records: traffic.Records) -> str:
    return traffic.to_topic(broker, "verdicts", records) + "?end=latest"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, records: traffic.Records) -> str:
    return traffic.to_files(tmp_path_factory.mktemp("logs") / "parts", records)


@pytest.fixture(scope="module")
def entries(records: traffic.Records, base_model: Path) -> list[oracle.Entry]:
    return traffic.entries(records, CheapEngine(base_model))


def calibration_set(entries: list[oracle.Entry]) -> list[oracle.Entry]:
    return [entry for entry in entries if entry.segments is not None][:CALIBRATION]


def job_of(case: str, base: Path, log: str, out: Path, entries: list[oracle.Entry]) -> Job:
    changes: dict[str, Any] = {
        "event_time": EventTime(traffic.TIME_FIELD),
        "epoch_ms": EPOCH_MS,
        "policy": make_policy(case.split()[0], SETTINGS),
    }
    if "snapshot" in case:
        changes["base_ranges"] = traffic.snapshot(calibration_set(entries))
    return cheap_job(base, (log,), out, **changes)


def expected_of(case: str, entries: list[oracle.Entry]) -> tuple[list[oracle.Verdict], Any]:
    memory = oracle.Memory.of(DIRECTIONS)
    if "snapshot" in case:
        memory = oracle.calibrate(
            [entry.segments or () for entry in calibration_set(entries)], DIRECTIONS
        )
    rules = oracle.Rules(case.split()[0])
    return oracle.judge_log(entries, EPOCH_MS, rules, memory), memory


@pytest.mark.parametrize("case", CASES)
def test_a_topic_in_small_and_large_slices_and_files_against_the_oracle(
    case: str, base_model: Path, topic: str, files: str, entries: list[oracle.Entry], tmp_path: Path
) -> None:
    large = run(job_of(case, base_model, topic, tmp_path / "l", entries), tmp_path / "state-l")
    expected, memory = expected_of(case, entries)
    assert_as_expected(large, expected, memory)

    job = job_of(case, base_model, topic, tmp_path / "s", entries)
    small = run(replace(job, slice_records=50), tmp_path / "state-s")
    assert small.commit.number > 10 > large.commit.number
    assert small.files() == large.files()
    assert small.ranges.hash == large.ranges.hash
    assert small.alerts() == large.alerts()
    assert small.reasons() == large.reasons() == traffic.DEAD

    job = job_of(case, base_model, files, tmp_path / "f", entries)
    by_file = run(replace(job, slice_records=70), tmp_path / "state-f")
    for table in ("conversations", "exceedances"):
        found, other = by_file.rows(table), large.rows(table)
        assert [placeless(row) for row in found] == [placeless(row) for row in other]
    assert by_file.ranges.hash == large.ranges.hash
    assert by_file.reasons() == traffic.DEAD


def assert_as_expected(
    outcome: Outcome, expected: list[oracle.Verdict], memory: oracle.Memory
) -> None:
    ledger = outcome.commit.total_ledger
    assert ledger.balanced
    assert ledger.skipped == traffic.SKIPPED
    assert ledger.dead_lettered == sum(traffic.DEAD.values())
    statuses = {verdict.judgement.status for verdict in expected}
    assert {Status.FLAGGED, Status.CLEAN} <= statuses, "the log has something of everything"
    assert any(verdict.late for verdict in expected)
    assert len({verdict.epoch for verdict in expected}) > 4
    expected = sorted(expected, key=lambda v: (v.entry.partition, v.entry.offset))
    rows = outcome.rows("conversations")
    assert [row_of(row) for row in rows] == [row_of_verdict(verdict) for verdict in expected]
    found = sorted(map(exceedance_of, outcome.rows("exceedances")))
    assert found == sorted(each for verdict in expected for each in exceedances_of(verdict))
    flagged = [v for v in expected if v.judgement.status is Status.FLAGGED]
    places = {(v.entry.partition, v.entry.offset) for v in flagged}
    alerts = [alert["resources"][0]["data"] for alert in outcome.alerts()]
    assert sorted((data["partition"], data["offset"]) for data in alerts) == sorted(places)
    assert_ranges(outcome.ranges, memory)


def placeless(row: Row) -> Row:
    """A row without its position: a file has other offsets, and no partitions."""
    return {name: row[name] for name in row.keys() - {"source", "partition", "offset"}}
