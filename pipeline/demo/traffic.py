"""The demonstration's log: real conversations, planted ones among them, a few broken records."""

import json
import random
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from kafka import KafkaProducer

SEED = 7
PARTITIONS = 2
BROKEN = (b"{cut off", b'{"event": "heartbeat"}', b'{"messages": []}')
"""Not conversations: each must come out as a dead letter."""

MARKER_AHEAD_MS = 120_000
"""How far the closing markers lie ahead: two epochs and more, within the ten minutes allowed."""


def mixed(real: Iterable[dict[str, Any]], planted: Sequence[dict[str, Any]]) -> list[bytes]:
    """All records in one order, fixed by the seed; real ones stay in theirs."""
    records = encoded(real)
    chance = random.Random(SEED)
    for extra in (*encoded(planted), *BROKEN):
        records.insert(chance.randrange(len(records) + 1), extra)
    return records


def encoded(records: Iterable[dict[str, Any]]) -> list[bytes]:
    """Each record as one line of JSON, without the line break."""
    return [json.dumps(record).encode() for record in records]


def produce(
    bootstrap: str, topic: str, records: Sequence[bytes], seconds: float, stop: threading.Event
) -> None:
    """Send the records at a steady rate over `seconds`, in turn to every partition."""
    producer = KafkaProducer(bootstrap_servers=bootstrap)
    started = time.monotonic()
    for index, record in enumerate(records):
        due = started + seconds * index / len(records)
        if stop.wait(max(due - time.monotonic(), 0)):
            break
        producer.send(topic, value=record, partition=index % PARTITIONS)
    producer.flush()
    producer.close()


def close_epochs(bootstrap: str, topic: str) -> int:
    """Move event time on with a tombstone per partition, so that the last epochs close.

    Traffic that goes on does this by itself; here it ends. Returns the number of records sent.
    """
    producer = KafkaProducer(bootstrap_servers=bootstrap)
    ahead = time.time_ns() // 10**6 + MARKER_AHEAD_MS
    for partition in range(PARTITIONS):
        producer.send(topic, key=b"end", value=None, partition=partition, timestamp_ms=ahead)
    producer.flush()
    producer.close()
    return PARTITIONS
