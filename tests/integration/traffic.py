"""Logs for whole jobs: real conversations with times out of order, and records that are none."""

import json
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from cheap_job import DIRECTIONS, MAX_TOKENS, MODEL, CheapEngine, cheap_directions
from extremes import as_oracle, from_oracle
from kafka import KafkaProducer

from pipeline.demo.broker import Broker
from transforms import formats
from transforms.model import roles
from transforms.ranges.calibration import calibrate
from transforms.ranges.ranges import Ranges

START_MS = 1_700_000_040_000
"""A whole minute."""

APART_MS = 400
JITTER_MS = 40_000
PARTITIONS = 3
TIME_FIELD = "logged.at"

Records = list[list[bytes]]
"""Per partition its records, in order."""


def records(conversations: Sequence[dict[str, Any]], seed: int = 3) -> Records:
    """Spread conversations over partitions, minutes apart in all, with broken ones in between."""
    chance = random.Random(seed)
    partitions: Records = [[] for _ in range(PARTITIONS)]
    for number, conversation in enumerate(conversations):
        time = START_MS + APART_MS * number + chance.randint(-JITTER_MS, JITTER_MS)
        timed = {**conversation, "logged": {"at": time}}
        chance.choice(partitions).append(json.dumps(timed).encode())
    for broken in _broken():
        partition = chance.choice(partitions)
        partition.insert(chance.randint(1, len(partition)), broken)
    return partitions


def _broken() -> list[bytes]:
    def with_time(time: Any, **fields: Any) -> bytes:
        return json.dumps({**fields, "logged": {"at": time}}).encode()

    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]
    late_year = 4_102_444_800_000  # 2100: nobody's clock
    return [
        b"{cut off",
        b"\xff\xfe not text",
        b"",
        b"   ",
        with_time(START_MS, event="heartbeat"),
        with_time(START_MS + 200_000, conversations=[]),
        with_time(START_MS + 100_000, conversations=[{"from": "martian", "value": "x"}]),
        with_time(late_year, conversations=talk),
        with_time("yesterday", conversations=talk),
        with_time(None, conversations=talk),
    ]


SKIPPED = 2
DEAD = {
    "bad_json": 1,
    "bad_encoding": 1,
    "unknown_format": 1,
    "empty_conversation": 1,
    "bad_messages": 1,
    "bad_time": 3,
}
"""What becomes of the broken ones."""


def to_topic(broker: Broker, topic: str, partitions: Records) -> str:
    """Produce the records to a new topic; returns its URI."""
    broker.create_topic(topic, len(partitions))
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        for number, values in enumerate(partitions):
            for value in values:
                producer.send(topic, value, partition=number)
    return f"kafka://{broker.bootstrap}/{topic}"


def to_files(folder: Path, partitions: Records) -> str:
    """Write the records to a file per partition; returns the glob that names them in order."""
    folder.mkdir()
    for number, values in enumerate(partitions):
        (folder / f"{number}.jsonl").write_bytes(b"".join(value + b"\n" for value in values))
    return str(folder / "*.jsonl")


def entries(partitions: Records, engine: CheapEngine) -> list[oracle.Entry]:
    """What an oracle needs to know of the records."""
    return [
        _entry(number, offset, value, engine)
        for number, values in enumerate(partitions)
        for offset, value in enumerate(values)
    ]


def _entry(partition: int, offset: int, value: bytes, engine: CheapEngine) -> oracle.Entry:
    time = _time(value)
    try:
        messages = formats.parse(value).messages
    except formats.DecodeError:
        return oracle.Entry(partition, offset, time)
    if time is None:
        return oracle.Entry(partition, offset, None)
    (tokens,) = roles.tokenize(engine.tokenizer(), [messages], MAX_TOKENS)
    assert isinstance(tokens, roles.Tokens)
    segments, _ = engine.scorer().score([tokens.ids], [tokens.roles])
    return oracle.Entry(partition, offset, time, as_oracle(segments, 0), len(tokens.ids))


def snapshot(entries: Sequence[oracle.Entry]) -> Ranges:
    """Ranges calibrated on entries that can be scored."""
    scored = [entry.segments for entry in entries if entry.segments is not None]
    segments = from_oracle(scored, DIRECTIONS)
    empty = Ranges.empty(DIRECTIONS, cheap_directions().hash, MODEL)
    return calibrate(lambda: [(np.arange(len(scored)), segments)], empty)


def _time(value: bytes) -> int | None:
    """The times written above that a job shall believe."""
    try:
        time = json.loads(value)["logged"]["at"]
    except ValueError:
        return None
    return time if isinstance(time, int) and time < START_MS + 10**9 else None
