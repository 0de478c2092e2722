"""What all cases share: broker, log, the undisturbed run, and the list of what was done."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import traffic
from cheap_job import cheap_job
from kafka import KafkaProducer
from marks import Marks
from subjects import BUILD, SUBJECTS, Subject
from verdict import Differences, Left
from watching import Watch

from pipeline.demo.broker import Broker
from transforms.logs.times import EventTime

LOG = "log"


@dataclass
class World:
    """A broker with a log on it, and what a run that nobody disturbs leaves."""

    folder: Path
    broker: Broker
    subject: Subject
    records: int  # in the log
    marks: Marks = field(default_factory=Marks)
    differences: Differences = field(default_factory=Differences)
    faults: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    broken: list[str] = field(default_factory=list)
    expected: Any = None

    @staticmethod
    @contextmanager
    def made(folder: Path, kind: str, conversations: int) -> Iterator["World"]:
        """Start the broker, fill the log, run undisturbed."""
        subject = SUBJECTS[kind](folder, conversations)
        with Broker(folder / "broker", BUILD / "kafka" / "jars") as broker:
            traffic.to_topic(broker, LOG, subject.records)
            seen = sum(map(len, subject.records)) + close_epochs(broker, LOG, conversations)
            world = World(folder, broker, subject, seen)
            world.expected = Left.by(world.watch("undisturbed").finish(seen), broker.bootstrap)
            yield world

    def watch(self, name: str, topic: str = LOG) -> Watch:
        """A job of its own on a topic: own state, archive, alerts and dead letters."""
        out, server = self.folder / name, self.broker.bootstrap
        for suffix in ("alerts", "dead"):
            self.broker.create_topic(f"{name}-{suffix}")
        job = cheap_job(
            self.subject.base,
            (f"kafka://{server}/{topic}",),
            out,
            alerts=f"kafka://{server}/{name}-alerts",
            dead_letters=f"kafka://{server}/{name}-dead",
            event_time=EventTime(traffic.TIME_FIELD),
            **self.subject.changes,
        )
        return Watch(job, out / "state", self.marks, self.subject.paced)

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


def close_epochs(broker: Broker, topic: str, conversations: int) -> int:
    """Move event time on, so that every epoch with conversations closes; how many records."""
    end = traffic.START_MS + traffic.APART_MS * conversations + 10**6
    value = json.dumps({"event": "end", "logged": {"at": end}}).encode()
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        for partition in range(traffic.PARTITIONS):
            producer.send(topic, value, partition=partition)
    return traffic.PARTITIONS
