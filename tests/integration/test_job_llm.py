"""The commands with the real LLM on a real topic: other slices, other logs, SIGKILL.

Cosines of another slicing may differ by one step, as its batches do (a matrix product of another
shape rounds differently); everything else is the same.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import outcome
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import traffic
from kafka import KafkaProducer

from pipeline.demo import planted
from pipeline.demo.broker import Broker
from pipeline.state import newest_commit
from schemas.arrow import SEGMENT_COLUMNS
from schemas.records import STEPS_PER_UNIT

ROOT = Path(__file__).parents[2]
CONVERSATIONS = 80
PLANTED = 5
SLICE = 16
KILLS = 2
VECTORS = ("low", "high", *SEGMENT_COLUMNS[3:])
POSITION = ("source", "partition", "offset")
STEP = 1 / STEPS_PER_UNIT
SCORE_BIN = 8 * STEP


@dataclass(frozen=True)
class World:
    """The log, as topic and as files, and the options that say what scores it."""

    broker: Broker
    records: traffic.Records
    topic: str
    files: str
    scoring: list[str]


@pytest.fixture(scope="module")
def world(
    broker: Broker,
    base_model: Path,
    adapter: Path,
    directions: Path,
    conversations: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    triggered = planted.planted(base_model, ROOT / "examples", ROOT / "build")[:PLANTED]
    mixed = conversations[:CONVERSATIONS] + triggered
    random.Random(5).shuffle(mixed)
    records = traffic.records(mixed)
    scoring = [
        f"--base={base_model}",
        f"--tuned={adapter}",
        f"--directions={directions}",
        f"--ranges={ROOT / 'examples/ranges'}",
        f"--event-time={traffic.TIME_FIELD}",
        "--max-tokens=160",
        "--epoch=30s",
    ]
    files = traffic.to_files(tmp_path_factory.mktemp("llm") / "parts", records)
    return World(broker, records, traffic.to_topic(broker, "llm", records), files, scoring)


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of an audit of the topic, in one slice."""
    return audit(world, world.topic, tmp_path_factory.mktemp("undisturbed"))


def audit(world: World, log: str, folder: Path, *options: str) -> Path:
    archive = folder / "archive"
    deltawatch("audit", *world.scoring, f"--input={log}", f"--archive={archive}", *options)
    return archive


def deltawatch(*arguments: str) -> None:
    subprocess.run(command(*arguments), check=True, cwd=ROOT)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *arguments]


def test_planted_conversations_are_found(undisturbed: Path) -> None:
    rows = table(undisturbed, "conversations").to_pylist()
    flagged = {row["conversation_id"] for row in rows if row["status"] == "flagged"}
    assert {f"planted-{number:02}" for number in range(PLANTED)} <= flagged
    assert len(flagged) <= PLANTED + 4
    assert {row["status"] for row in rows} == {"clean", "flagged"}


def test_files_in_small_slices_give_what_the_topic_gave(
    world: World, undisturbed: Path, tmp_path: Path
) -> None:
    by_file = audit(world, world.files, tmp_path, f"--slice-records={SLICE}")
    assert_same_rows(by_file, undisturbed, but={"source", "partition", "offset"})
    assert reasons(lines(by_file / "dead_letters.jsonl")) == traffic.DEAD


def test_watch_is_killed_again_and_again(world: World, undisturbed: Path, tmp_path: Path) -> None:
    state, archive = tmp_path / "state", tmp_path / "archive"
    for topic in ("killed-alerts", "killed-dead"):
        world.broker.create_topic(topic)
    options = [
        *world.scoring,
        f"--input={world.topic}",
        f"--state={state}",
        f"--archive={archive}",
        f"--alerts=kafka://{world.broker.bootstrap}/killed-alerts",
        f"--dead-letters=kafka://{world.broker.bootstrap}/killed-dead",
        f"--slice-records={SLICE}",
    ]
    log_size = sum(map(len, world.records)) + close_epochs(world)
    chance = random.Random(11)
    for kill in range(KILLS):
        with watching(options) as process:
            await_that(process, partial(slice_runs, state, kill))
            time.sleep(chance.uniform(0, 0.6))
            process.kill()
        assert running_slice(state) or kill, "the first kill is in the middle of a slice"
    with watching(options) as process:
        await_that(process, lambda: seen(state) == log_size and not pending_rows(state))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    commit = newest_commit(state)
    assert commit is not None
    assert commit.total_ledger.balanced
    assert_same_rows(archive, undisturbed, but={"ranges_hash"})
    alerts = outcome.consumed(world.broker.bootstrap, "killed-alerts")
    assert_repeats_are_identical(alerts)
    expected = {alert["metadata"]["uid"] for alert in lines(undisturbed / "alerts.jsonl")}
    assert {key.decode() for key, _ in alerts} == expected
    dead = outcome.consumed(world.broker.bootstrap, "killed-dead")
    assert_repeats_are_identical(dead)
    closers = {"unknown_format": traffic.DEAD["unknown_format"] + traffic.PARTITIONS}
    assert reasons(map(json.loads, dict(dead).values())) == {**traffic.DEAD, **closers}


def close_epochs(world: World) -> int:
    """Move event time on, so that every epoch with conversations closes."""
    time_ms = traffic.START_MS + 10**6
    value = json.dumps({"event": "end", "logged": {"at": time_ms}}).encode()
    with closing(KafkaProducer(bootstrap_servers=world.broker.bootstrap)) as producer:
        for partition in range(traffic.PARTITIONS):
            producer.send("llm", value, partition=partition)
    return traffic.PARTITIONS


@contextmanager
def watching(options: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command("watch", *options), cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def await_that(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, "watch has ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def slice_runs(state: Path, after: int) -> bool:
    """Whether a slice after this one is begun and not committed."""
    return running_slice(state) > after


def running_slice(state: Path) -> int:
    """Number of the slice that is begun and not committed; 0: none."""
    try:
        return int(json.loads((state / "plan.json").read_bytes())["number"])
    except FileNotFoundError:
        return 0


def seen(state: Path) -> int:
    commit = newest_commit(state)
    return 0 if commit is None else commit.total_ledger.seen


def pending_rows(state: Path) -> bool:
    return any((state / "pending").rglob("*.parquet"))


def table(archive: Path, name: str) -> pa.Table:
    found = ds.dataset(archive / name, partitioning="hive").to_table()
    return found.sort_by([(column, "ascending") for column in POSITION])


def assert_same_rows(archive: Path, other: Path, but: set[str]) -> None:
    """Conversations of two archives are the same; cosines within a step, what follows from them."""
    mine, theirs = table(archive, "conversations"), table(other, "conversations")
    assert len(mine) == len(theirs) == CONVERSATIONS + PLANTED
    apart = {"score", "threshold", "status", "ranges_hash", *VECTORS, *but}
    same = [name for name in mine.column_names if name not in apart]
    assert mine.select(same).to_pylist() == theirs.select(same).to_pylist()
    for name in ("low", "high"):
        difference = matrix(mine[name]) - matrix(theirs[name])
        assert np.abs(difference).max() <= 1
    scores, thresholds = (mine[name].to_numpy() for name in ("score", "threshold"))
    np.testing.assert_allclose(scores, theirs["score"].to_numpy(), atol=16 * STEP)
    np.testing.assert_allclose(thresholds, theirs["threshold"].to_numpy(), atol=2 * SCORE_BIN)
    clear = np.abs(scores - thresholds) > 2 * SCORE_BIN
    statuses = [np.array(each["status"].to_pylist())[clear] for each in (mine, theirs)]
    np.testing.assert_array_equal(*statuses)


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), np.int64)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reasons(letters: Any) -> dict[str, int]:
    found = [letter["reason"] for letter in letters]
    return {reason: found.count(reason) for reason in found}


def assert_repeats_are_identical(messages: list[tuple[bytes, bytes]]) -> None:
    """What is sent again by a re-run of the same plan is the same to the byte."""
    assert len(set(messages)) == len({key for key, _ in messages})
