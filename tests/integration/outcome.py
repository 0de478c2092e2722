"""Runs jobs and reads back everything they left, in forms that can be compared."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
from kafka import KafkaConsumer, TopicPartition

from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State
from schemas.arrow import SCHEMA_VERSION_KEY
from schemas.commit import Commit
from transforms.ranges.ranges import Ranges

Row = dict[str, Any]
Messages = list[tuple[bytes, bytes]]
"""Keys and values."""

Key = tuple[int, int]
"""Partition, or place of the file among the files, and place of the record in it."""


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    job: Job
    commit: Commit
    by_model: Mapping[str, Ranges]

    @property
    def ranges(self) -> Ranges:
        """Those of a job's only model."""
        (ranges,) = self.by_model.values()
        return ranges

    def rows(self, table: str) -> list[Row]:
        """Rows of a table in the order of the log, dates and models from the folders included."""
        found: list[Row] = []
        for model in (self.job.archive / table).iterdir():  # models differ in their columns' size
            # The first file's columns are read of all: the newest version's, whatever lies first.
            files = sorted(map(str, model.rglob("*.parquet")), key=_schema_version, reverse=True)
            found += ds.dataset(files, partitioning="hive").to_table().to_pylist()
        return sorted(found, key=lambda row: (row["source"], row["partition"], row["offset"]))

    def files(self) -> dict[str, bytes]:
        """Content of the archive's files by their path, without what names the run."""
        root, run = self.job.archive, f"{self.job.run_id}-"
        paths = sorted(root.rglob("*.parquet"))
        return {str(path.relative_to(root)).replace(run, ""): path.read_bytes() for path in paths}

    def alerts(self) -> list[Row]:
        """Alerts in the order of their ids."""
        return sorted(_lines(self.job.alerts), key=lambda alert: alert["metadata"]["uid"])

    def reasons(self) -> Counter[str]:
        """How many dead letters there are of each reason."""
        return Counter(letter["reason"] for letter in _lines(self.job.dead_letters))


def run(job: Job, state: Path) -> Outcome:
    """Run a job that has an end to its end."""
    held = State(state)
    slices = Slices(job, held)
    while slices.step():
        pass
    held.close()
    return Outcome(job, slices.commit, slices.ranges())


def consumed(bootstrap: str, topic: str) -> Messages:
    """Keys and values of all that a topic of one partition holds."""
    partition = TopicPartition(topic, 0)
    found: Messages = []
    with closing(KafkaConsumer(bootstrap_servers=bootstrap)) as consumer:
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        end = consumer.end_offsets([partition])[partition]
        while consumer.position(partition) < end:
            for batch in consumer.poll(timeout_ms=500).values():
                found += [(record.key, record.value) for record in batch]
    return found


def _schema_version(path: str) -> int:
    return int(pq.read_schema(path).metadata[SCHEMA_VERSION_KEY.encode()])


def _lines(path: str) -> list[Row]:
    file = Path(path)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
