"""What all cases share: broker, log, the undisturbed run, and the list of what was done."""

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import traffic
from cheap_job import CheapEngine, cheap_job
from kafka import KafkaProducer
from marks import Marks
from verdict import Differences, Left
from watching import Watch

from pipeline.demo.assets import base_model, sharegpt
from pipeline.demo.broker import Broker
from transforms.logs.times import EventTime
from transforms.ranges.ranges import Ranges

BUILD = Path(__file__).parents[2] / "build"
SLICE_RECORDS = 500
CALIBRATION = 150
"""Conversations of each partition that the ranges are made of."""

LOG = "log"


@dataclass
class World:
    """A broker with a log on it, and what a run that nobody disturbs leaves."""

    folder: Path
    broker: Broker
    base: Path
    records: int  # in the log
    ranges: Ranges
    marks: Marks = field(default_factory=Marks)
    differences: Differences = field(default_factory=Differences)
    faults: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    broken: list[str] = field(default_factory=list)
    expected: Any = None

    @staticmethod
    @contextmanager
    def made(folder: Path, conversations: int) -> Iterator["World"]:
        """Start the broker, fill the log, run undisturbed."""
        with Broker(folder / "broker", BUILD / "kafka" / "jars") as broker:
            records = traffic.records(real(conversations))
            traffic.to_topic(broker, LOG, records)
            seen = sum(map(len, records)) + close_epochs(broker, LOG, conversations)
            base = base_model(BUILD / "models" / "base")
            first = traffic.entries([part[:CALIBRATION] for part in records], CheapEngine(base))
            world = World(folder, broker, base, seen, traffic.snapshot(first))
            world.expected = Left.by(world.watch("undisturbed").finish(seen), broker.bootstrap)
            yield world

    def watch(self, name: str, topic: str = LOG, enter: Callable[[], None] = lambda: None) -> Watch:
        """A job of its own on a topic: own state, archive, alerts and dead letters."""
        out, server = self.folder / name, self.broker.bootstrap
        for suffix in ("alerts", "dead"):
            self.broker.create_topic(f"{name}-{suffix}")
        job = cheap_job(
            self.base,
            (f"kafka://{server}/{topic}",),
            out,
            alerts=f"kafka://{server}/{name}-alerts",
            dead_letters=f"kafka://{server}/{name}-dead",
            event_time=EventTime(traffic.TIME_FIELD),
            base_ranges=self.ranges,
            slice_records=SLICE_RECORDS,
        )
        return Watch(job, out / "state", self.marks, enter)

    def compare(self, watch: Watch) -> None:
        """Let a disturbed run come to its end and compare it."""
        left = Left.by(watch.finish(self.records), self.broker.bootstrap)
        print(f"  {self.differences.add(left, self.expected)}", flush=True)

    def did(self, fault: str, recovery: float = 0.0) -> None:
        """Note a fault, and in seconds how long the job took to commit again."""
        self.faults[fault].append(recovery)

    def promise(self, kept: bool, what: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.broken.append(what)
            print(f"  BROKEN: {what}", file=sys.stderr)


def real(count: int) -> list[dict[str, Any]]:
    """Real conversations; once there are no more of them, the same under other ids."""
    found = list(sharegpt(0, count))
    numbered = enumerate(itertools.islice(itertools.cycle(found), count))
    return [{**each, "id": f"{each['id']}/{n // len(found)}"} for n, each in numbered]


def close_epochs(broker: Broker, topic: str, conversations: int) -> int:
    """Move event time on, so that every epoch with conversations closes; how many records."""
    end = traffic.START_MS + traffic.APART_MS * conversations + 10**6
    value = json.dumps({"event": "end", "logged": {"at": end}}).encode()
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        for partition in range(traffic.PARTITIONS):
            producer.send(topic, value, partition=partition)
    return traffic.PARTITIONS
