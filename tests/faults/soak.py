"""A job under steady traffic for a long time: does it grow? `make soak`.

Watches a topic on a real broker in epochs of half a minute, while records are sent at a steady
rate. Every few seconds memory, open files and the size of the state are read from outside. Prints
for each the slope of a line through the lowest value of every minute after the first third, with
its standard error, and, as the last line, one JSON object. Ends with 1 where something grows.
"""

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from cheap_job import cheap_job
from kafka import KafkaProducer
from marks import Marks
from slopes import slope
from subjects import BUILD, SUBJECTS, Subject
from watching import Watch

from pipeline.demo.broker import Broker

EPOCH_MS = 30_000
SAMPLE_S = 5
CONVERSATIONS = 2000
"""Are sent again and again."""

COURSE_S = 300
PARTITIONS = 3


@dataclass(frozen=True)
class Sample:
    """One look from outside."""

    at: float  # seconds since the beginning
    rss: int  # bytes
    files: int  # open
    state: int  # bytes


def main() -> int:
    """Run; the exit status is 1 where something grows or records are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=30, help="records a second (30)")
    parser.add_argument("--subject", choices=list(SUBJECTS), default="cheap")
    known = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as name,
        Broker(Path(name, "broker"), BUILD / "kafka" / "jars") as broker,
    ):
        subject = SUBJECTS[known.subject](Path(name), CONVERSATIONS)
        watch = _watch(Path(name), broker, subject)
        sent, samples = _soak(watch, broker, subject, known.minutes * 60, known.rate)
        missing = sent - watch.seen
    return _report(samples, sent, missing)


def _watch(folder: Path, broker: Broker, subject: Subject) -> Watch:
    for topic, partitions in (("log", PARTITIONS), ("alerts", 1), ("dead", 1)):
        broker.create_topic(topic, partitions)
    job = cheap_job(
        subject.base,
        (f"kafka://{broker.bootstrap}/log",),
        folder,
        alerts=f"kafka://{broker.bootstrap}/alerts",
        dead_letters=f"kafka://{broker.bootstrap}/dead",
        epoch_ms=EPOCH_MS,
        **subject.changes,
    )
    return Watch(job, folder / "state", Marks(), paced=True)


def _soak(
    watch: Watch, broker: Broker, subject: Subject, seconds: float, rate: float
) -> tuple[int, list[Sample]]:
    """Send and look until the time is over, then let the job come to the end."""
    values = itertools.cycle(itertools.chain.from_iterable(subject.records))
    sent, samples, started = 0, [], time.monotonic()
    with (
        watch.running() as process,
        closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer,
    ):
        while (passed := time.monotonic() - started) < seconds:
            for value in itertools.islice(values, int(rate * passed) - sent):
                producer.send("log", value, partition=sent % PARTITIONS)
                sent += 1
            samples.append(_look(process, watch.state, passed))
            time.sleep(SAMPLE_S - (time.monotonic() - started) % SAMPLE_S)
        producer.flush()
        watch.until(lambda: watch.seen >= sent, process, 1)
    return sent, samples


def _look(process: BaseProcess, state: Path, at: float) -> Sample:
    assert process.is_alive(), f"the job ended by itself, exit status {process.exitcode}"
    proc = Path(f"/proc/{process.pid}")
    pages = int((proc / "statm").read_text().split()[1])
    files = len(os.listdir(proc / "fd"))
    return Sample(at, pages * os.sysconf("SC_PAGE_SIZE"), files, sum(_sizes(state)))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a slice's files come and go
            yield path.stat().st_size


QUANTITIES: dict[str, tuple[Callable[[Sample], int], float, str]] = {
    "rss": (lambda sample: sample.rss, 1e6, "MB"),
    "open_files": (lambda sample: sample.files, 1, ""),
    "state": (lambda sample: sample.state, 1e3, "kB"),
}
"""What is measured, in what unit."""


def _report(samples: Sequence[Sample], sent: int, missing: int) -> int:
    settled = [sample for sample in samples if sample.at > samples[-1].at / 3]
    at = np.array([sample.at for sample in settled])
    slopes = {
        name: slope(at, np.array([value(sample) for sample in settled]) / unit)
        for name, (value, unit, _) in QUANTITIES.items()
    }
    _print_course(samples)
    print(f"{'quantity':<12}{'mean':>12}{'slope an hour':>16}{'standard error':>16}  flat")
    for name, found in slopes.items():
        label = f"{name} {QUANTITIES[name][2]}"
        print(
            f"{label:<12}{found.mean:>12,.1f}{found.per_hour:>16,.2f}{found.error:>16,.2f}"
            f"  {'yes' if found.flat else 'NO'}"
        )
    flat = all(found.flat for found in slopes.values())
    figures = {name: [found.mean, found.per_hour, found.error] for name, found in slopes.items()}
    result = {"minutes": samples[-1].at / 60, "records": sent, "missing": missing, "flat": flat}
    print(json.dumps({**result, "mean_slope_error": figures}))
    return int(not flat or missing != 0)


def _print_course(samples: Sequence[Sample]) -> None:
    """The lowest value of every few minutes, from the beginning."""
    parts = [
        [sample for sample in samples if sample.at // COURSE_S == number]
        for number in range(int(samples[-1].at // COURSE_S) + 1)
    ]
    for name, (value, unit, label) in QUANTITIES.items():
        lowest = [f"{min(value(each) for each in part) / unit:,.1f}" for part in parts]
        print(f"{name} {label}: every {COURSE_S // 60} min {' '.join(lowest)}")


if __name__ == "__main__":
    sys.exit(main())
