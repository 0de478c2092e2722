"""The demonstration's helpers beside the main thread: `deltawatch watch`, and who shows alerts."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kafka import KafkaConsumer, TopicPartition

from pipeline.report import say
from schemas.describe import describe
from schemas.errors import RunFailedError

STOP_SECONDS = 60


class Watch:
    """A `deltawatch watch` in its own process, stopped whatever happens."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches the demonstration only, which then stops it in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "watch", *self._arguments],
            start_new_session=True,
        )
        return self

    def check(self) -> None:
        """Raise RunFailedError when it has ended by itself."""
        if self._process.poll() is not None:
            raise RunFailedError(f"watch ended with status {self._process.returncode}")

    def stop(self) -> int:
        """Ask it to stop after its slice; returns its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_SECONDS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Alerts:
    """Reads an alerts topic in a thread and shows every alert once, as it is raised."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.conversations: set[str] = set()
        self._consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
        self._consumer.assign([TopicPartition(topic, 0)])
        self._consumer.seek_to_beginning()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def finish(self) -> None:
        """Read what is there, then end."""
        self._ending.set()
        self._thread.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()
        self._consumer.close()

    def _follow(self) -> None:
        while True:
            ending = self._ending.is_set()
            batches = self._consumer.poll(timeout_ms=500)
            for record in (record for batch in batches.values() for record in batch):
                self._show(json.loads(record.value))
            if ending and not batches:
                return

    def _show(self, event: dict[str, object]) -> None:
        alert = describe(event)
        conversation = event["resources"][0]["uid"]  # type: ignore[index]
        if conversation not in self.conversations:
            self.conversations.add(conversation)
            say(alert)


def save_topic(bootstrap: str, topic: str, path: Path) -> None:
    """Copy a topic of one partition to a JSONL file: the broker goes when the demo ends."""
    partition = TopicPartition(topic, 0)
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    consumer.assign([partition])
    consumer.seek_to_beginning()
    end = consumer.end_offsets([partition])[partition]
    with path.open("wb") as file:
        while consumer.position(partition) < end:
            for records in consumer.poll(timeout_ms=500).values():
                file.writelines(record.value + b"\n" for record in records)
    consumer.close()
