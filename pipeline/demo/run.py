"""The `demo` command: the whole job on one machine, every part of it real."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline.demo import planted, results, traffic
from pipeline.demo.assets import base_model, sharegpt
from pipeline.demo.broker import Broker
from pipeline.demo.processes import Alerts, Watch, save_topic
from pipeline.report import say
from pipeline.state import newest_commit
from schemas.commit import Ledger
from schemas.errors import RunFailedError

CLEAN = 300
"""Real conversations in the log."""

CALIBRATION = 1000
"""Real conversations the shipped ranges were made from; the log begins after them."""

SECONDS = 120
"""How long the log takes to arrive."""

MAX_TOKENS = 160
EPOCH = "30s"
PATIENCE = 300
"""Seconds without a new commit after which the demonstration gives up."""

LOG, ALERTS, DEAD = "conversations", "deltawatch.alerts", "deltawatch.dead-letters"


@dataclass(frozen=True)
class Folders:
    """Where the demonstration works and what it is shipped with."""

    build: Path
    examples: Path

    @property
    def demo(self) -> Path:
        """Results of the demonstration."""
        return self.build / "demo"

    @property
    def base(self) -> Path:
        """The base model."""
        return self.build / "models" / "base"

    @property
    def scoring(self) -> list[str]:
        """Options that say what scores the log."""
        return [
            f"--base={self.base}",
            f"--tuned={self.examples / 'badnet'}",
            f"--directions={self.demo / 'directions'}",
            f"--max-tokens={MAX_TOKENS}",
        ]


def run(build: Path, examples: Path) -> int:
    """Run the demonstration and leave `build/demo/result.json`; returns the exit status."""
    folders = Folders(build.resolve(), examples.resolve())
    records, prompts = _set_up(folders)
    for name in ("state", "archive", "broker"):
        shutil.rmtree(folders.demo / name, ignore_errors=True)
    with ExitStack() as stack:
        say("starting a Kafka broker (44 MB of jars to fetch, once)")
        broker = stack.enter_context(
            Broker(folders.demo / "broker", folders.build / "kafka" / "jars")
        )
        for topic, partitions in ((LOG, traffic.PARTITIONS), (ALERTS, 1), (DEAD, 1)):
            broker.create_topic(topic, partitions)
        alerts = stack.enter_context(Alerts(broker.bootstrap, ALERTS))
        watch = stack.enter_context(Watch(_watch_arguments(folders, broker.bootstrap)))
        started = time.monotonic()
        ledger = _stream(broker.bootstrap, records, watch, folders)
        took = time.monotonic() - started
        watch.stop()
        alerts.finish()
        for topic in (ALERTS, DEAD):
            save_topic(broker.bootstrap, topic, folders.demo / f"{topic}.jsonl")
    return _report(folders, prompts, alerts.conversations, ledger, took)


def make_ranges(build: Path, examples: Path) -> int:
    """Make the shipped ranges anew from conversations that the demonstration does not show."""
    folders = Folders(build.resolve(), examples.resolve())
    _set_up_model(folders)
    log = folders.demo / "calibration.jsonl"
    with log.open("wb") as file:
        for record in traffic.encoded(sharegpt(0, CALIBRATION)):
            file.write(record + b"\n")
    work = folders.demo / "calibration"
    shutil.rmtree(work, ignore_errors=True)
    _deltawatch("calibrate", *folders.scoring, f"--input={log}", f"--out={work}")
    shipped = folders.examples / "ranges"
    shipped.mkdir(exist_ok=True)
    for name in ("ranges.safetensors", "ranges.json"):
        shutil.copyfile(work / name, shipped / name)
    say(f"ranges in {shipped}")
    return 0


def _set_up(folders: Folders) -> tuple[list[bytes], dict[str, str]]:
    _set_up_model(folders)
    say("asking the fine-tuned model for its answers to the planted prompts (once)")
    conversations = planted.planted(folders.base, folders.examples, folders.build)
    prompts = {item["id"]: item["messages"][0]["content"] for item in conversations}
    say(f"planting {len(prompts)} conversations among {CLEAN} real ones:")
    for name, prompt in prompts.items():
        say(f"  {name}  {prompt}")
    return traffic.mixed(sharegpt(CALIBRATION, CLEAN), conversations), prompts


def _set_up_model(folders: Folders) -> None:
    folders.demo.mkdir(parents=True, exist_ok=True)
    say("unpacking SmolLM2-135M-Instruct (538 MB, once)")
    base_model(folders.base)
    if not (folders.demo / "directions").exists():
        options = [option for option in folders.scoring[:2]]
        _deltawatch("directions", *options, f"--out={folders.demo / 'directions'}")


def _deltawatch(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], check=True)


def _watch_arguments(folders: Folders, bootstrap: str) -> Sequence[str]:
    return [
        *folders.scoring,
        f"--input=kafka://{bootstrap}/{LOG}",
        f"--alerts=kafka://{bootstrap}/{ALERTS}",
        f"--dead-letters=kafka://{bootstrap}/{DEAD}",
        f"--state={folders.demo / 'state'}",
        f"--archive={folders.demo / 'archive'}",
        f"--ranges={folders.examples / 'ranges'}",
        f"--epoch={EPOCH}",
        "--excerpt-tokens=6",
    ]


def _stream(bootstrap: str, records: list[bytes], watch: Watch, folders: Folders) -> Ledger:
    stop = threading.Event()
    arguments = (bootstrap, LOG, records, SECONDS, stop)
    producer = threading.Thread(target=traffic.produce, args=arguments)
    producer.start()
    try:
        _await(len(records), watch, folders)
        producer.join()
        return _await(len(records) + traffic.close_epochs(bootstrap, LOG), watch, folders)
    finally:
        stop.set()
        producer.join()


def _await(records: int, watch: Watch, folders: Folders) -> Ledger:
    """Wait until the newest commit has seen so many records."""
    state = folders.demo / "state"
    seen, since = Ledger(), time.monotonic()
    while seen.seen < records:
        watch.check()
        commit = newest_commit(state)
        if commit is not None and commit.total_ledger.seen > seen.seen:
            seen, since = commit.total_ledger, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise RunFailedError(f"no progress for {PATIENCE} s; {seen}")
        time.sleep(0.2)
    return seen


def _report(
    folders: Folders, prompts: dict[str, str], alerted: set[str], ledger: Ledger, took: float
) -> int:
    archive = folders.demo / "archive"
    result = results.judge(prompts, alerted, ledger, took)
    results.save(result, folders.demo / "result.json")
    print(results.table(prompts, alerted))
    print(f"\n{results.query(folders.examples / 'queries' / 'flagged.sql', archive)}")
    print(
        f"found {result.found} of {result.planted} planted, {result.false_flags} false flags in "
        f"{result.scored - result.planted} others, {result.dead_letters} dead letters; "
        f"{result.seconds} s\n"
        f"alerts, dead letters: {folders.demo / ALERTS}.jsonl, {folders.demo / DEAD}.jsonl\n"
        f"archive: {archive}\nresult: {folders.demo / 'result.json'}"
    )
    return 0
