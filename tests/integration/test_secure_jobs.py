"""Whole jobs and commands on a broker that knows its users; see test_kafka_clients for the rest."""

import json
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import traffic
from cheap_job import SETTINGS, cheap_job
from outcome import Outcome, Row, run
from secure_broker import PASSWORD, SecureBroker

from pipeline.cli import main
from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State
from schemas.client_properties import ClientProperties
from schemas.errors import RunFailedError
from transforms.delivery.sinks import DeliveryError, open_sink
from transforms.logs.entries import LogError
from transforms.logs.open import open_logs
from transforms.logs.times import EventTime
from transforms.ranges.policies import make_policy

TIMED = EventTime(traffic.TIME_FIELD)
SOON = make_policy("percentile", SETTINGS)
"""Flags after a few dozen conversations."""


@pytest.fixture(scope="module")
def log(secured: SecureBroker, conversations: list[dict[str, Any]]) -> str:
    """Name of a topic that the user may read."""
    traffic.to_topic(secured.broker, "secured-log", traffic.records(conversations[:250]))
    secured.allow("READ", "secured-log")
    return "secured-log"


@pytest.fixture(scope="module")
def undisturbed(
    secured: SecureBroker, base_model: Path, log: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What a job makes of the topic that reads it at the open listener."""
    out = tmp_path_factory.mktemp("undisturbed")
    uri = f"kafka://{secured.broker.bootstrap}/{log}?end=latest"
    job = cheap_job(base_model, (uri,), out, event_time=TIMED, policy=SOON)
    return run(job, out / "state")


def secure_job(secured: SecureBroker, base: Path, log: str, out: Path, name: str) -> Job:
    """A job on the secured listener, with topics of its own and no rights but those it needs."""
    topics = f"{name}-alerts", f"{name}-dead"
    for topic in topics:
        secured.broker.create_topic(topic)
        secured.allow("WRITE", topic)
    alerts, dead = (f"kafka://{secured.scram}/{topic}" for topic in topics)
    return cheap_job(
        base,
        (f"kafka://{secured.scram}/{log}?end=latest",),
        out,
        event_time=TIMED,
        policy=SOON,
        alerts=alerts,
        dead_letters=dead,
        slice_records=100,
        kafka_properties=ClientProperties(secured.properties(name)),
    )


def sent(secured: SecureBroker, uri: str) -> list[Row]:
    """What lies in a topic, read at the open listener."""
    topic = uri.rpartition("/")[2]
    (found,) = open_logs(f"kafka://{secured.broker.bootstrap}/{topic}?end=latest")
    return [json.loads(entry.value or b"") for entry in found.read(0, 0, found.end(0))]


def by_id(alerts: Sequence[Row]) -> dict[str, Row]:
    return {alert["metadata"]["uid"]: alert for alert in alerts}


def test_a_whole_job_with_a_password_is_the_job_at_an_open_listener(
    secured: SecureBroker, base_model: Path, log: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    job = secure_job(secured, base_model, log, tmp_path / "secure", "whole")
    outcome = run(job, tmp_path / "state")
    assert outcome.files() == undisturbed.files()
    alerts = sent(secured, job.alerts)
    assert len(alerts) == len(undisturbed.alerts()) > 0
    assert by_id(alerts) == by_id(undisturbed.alerts())
    assert Counter(letter["reason"] for letter in sent(secured, job.dead_letters)) == traffic.DEAD
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]


def test_a_job_holds_no_secret_and_is_the_same_under_another_one(
    secured: SecureBroker, base_model: Path, log: str, tmp_path: Path
) -> None:
    job = secure_job(secured, base_model, log, tmp_path, "hash")
    other = replace(job, kafka_properties=ClientProperties(tmp_path / "elsewhere.properties"))
    assert job.config_hash == other.config_hash
    assert PASSWORD not in repr(job)
    assert PASSWORD.encode() not in pickle.dumps(job.kafka_properties)
    assert pickle.loads(pickle.dumps(job.kafka_properties)).read()["sasl.password"] == PASSWORD


@pytest.mark.parametrize(
    ("right", "which", "says"),
    [("WRITE", "alerts", "did not acknowledge: this user lacks"), ("READ", "log", "this user")],
)
def test_a_right_taken_away_fails_the_run_and_loses_nothing(
    right: str,
    which: str,
    says: str,
    secured: SecureBroker,
    base_model: Path,
    log: str,
    undisturbed: Outcome,
    tmp_path: Path,
) -> None:
    job = secure_job(secured, base_model, log, tmp_path / "out", f"taken-{which}")
    topic = log if which == "log" else f"taken-{which}-alerts"
    state = State(tmp_path / "state")
    slices = Slices(job, state)
    slices.step()
    secured.forbid(right, topic)
    with pytest.raises(RunFailedError) as caught:
        while slices.step():
            pass
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert PASSWORD not in message
    secured.allow(right, topic)
    state.close()
    resumed = run(job, tmp_path / "state")
    assert resumed.files() == undisturbed.files()
    assert resumed.commit.total_ledger == undisturbed.commit.total_ledger
    assert by_id(sent(secured, job.alerts)) == by_id(undisturbed.alerts())


def test_a_password_that_rotates_is_read_anew_for_the_next_client(secured: SecureBroker) -> None:
    secured.broker.create_topic("rotation")
    for right in ("READ", "WRITE"):
        secured.allow(right, "rotation", "rotating")

    def change(password: str) -> Path:
        return secured.properties("rotating", sasl_username="rotating", sasl_password=password)

    secured.set_password("rotating", "first")
    properties = ClientProperties(change("first"))
    uri = f"kafka://{secured.scram}/rotation"
    sink, (log,) = open_sink(uri, properties), open_logs(uri, properties)

    def pass_on(value: bytes) -> None:
        sink.send(b"key", value)
        assert sink.flush() == 1
        assert [entry.value for entry in log.read(0, log.end(0) - 1, log.end(0))] == [value]

    pass_on(b"one")
    threads = threading.active_count()
    secured.set_password("rotating", "second")
    change("second")
    pass_on(b"two")
    assert threading.active_count() <= threads
    change("third")
    with pytest.raises(DeliveryError, match="refuses this user"):
        sink.send(b"key", b"three")
    with pytest.raises(LogError, match="refuses this user"):
        log.end(0)
    change("second")
    pass_on(b"four")


@pytest.fixture
def audit(secured: SecureBroker, log: str, tmp_path: Path) -> dict[str, str]:
    """Options of an `audit` in which the model is the first thing wrong."""
    for topic in ("cli-alerts", "cli-dead"):
        if topic not in secured.topics():
            secured.broker.create_topic(topic)
            secured.allow("WRITE", topic)
    return {
        "input": f"kafka://{secured.scram}/{log}",
        "alerts": f"kafka://{secured.scram}/cli-alerts",
        "dead-letters": f"kafka://{secured.scram}/cli-dead",
        "archive": str(tmp_path / "archive"),
        "kafka-properties": str(secured.properties("cli")),
        "base": "/nowhere",
        "tuned": "/nowhere",
        "directions": "/nowhere",
    }


def arguments(options: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def refusal(options: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["audit", *arguments(options)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("deltawatch: ")
    assert message.count("\n") == 1
    return message


def test_a_command_refuses_what_is_wrong_before_it_looks_at_the_model(
    secured: SecureBroker, audit: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "/nowhere is not a folder" in refusal(audit, capsys)
    other_ca = str(secured.properties("cli-ca", ssl_ca_location="other-ca.pem"))
    assert "is not trusted" in refusal({**audit, "kafka-properties": other_ca}, capsys)
    swapped = {**audit, "input": audit["alerts"]}
    assert "this user may not read topic 'cli-alerts'" in refusal(swapped, capsys)
    for option in ("alerts", "dead-letters"):
        swapped = {**audit, option: audit["input"]}
        assert "this user may not write topic 'secured-log'" in refusal(swapped, capsys)
    half = str(secured.properties("cli-half", sasl_password=None))
    assert "no sasl.password" in refusal({**audit, "kafka-properties": half}, capsys)


def test_calibrate_and_audit_by_their_commands(
    secured: SecureBroker,
    base_model: Path,
    adapter: Path,
    directions: Path,
    conversations: list[dict[str, Any]],
    audit: dict[str, str],
    tmp_path: Path,
) -> None:
    values = [json.dumps(conversation).encode() for conversation in conversations[:8]]
    traffic.to_topic(secured.broker, "few", [[*values, b"{cut off"]])
    secured.allow("READ", "few")
    model = {"base": str(base_model), "tuned": str(adapter), "directions": str(directions)}
    both = {**model, "input": f"kafka://{secured.scram}/few", "max-tokens": "24"}
    both["kafka-properties"] = audit["kafka-properties"]
    ranges = str(tmp_path / "ranges")
    assert main(["calibrate", *arguments({**both, "out": ranges})]) == 0
    assert main(["audit", *arguments({**audit, **both, "ranges": ranges})]) == 0
    (letter,) = sent(secured, audit["dead-letters"])
    assert letter["reason"] == "bad_json"


def test_a_wrong_password_is_one_line_of_a_process_with_a_configuration_file(
    secured: SecureBroker, audit: dict[str, str], tmp_path: Path
) -> None:
    wrong = secured.properties("cli-wrong", sasl_password="not-the-password")
    options = {**audit, "kafka-properties": str(wrong), "input": [audit["input"]]}
    config = tmp_path / "audit.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))
    command = [sys.executable, "-m", "pipeline.cli", "audit", f"--config={config}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "refuses this user" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "not-the-password" not in done.stderr
