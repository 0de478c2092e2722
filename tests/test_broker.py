import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import TopicAlreadyExistsError

from pipeline.demo.broker import Broker
from schemas.errors import RunFailedError

Record = tuple[int, int, bytes]  # partition, offset, value


def produce(broker: Broker, topic: str, values: list[bytes], partitions: int) -> list[Record]:
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        sent = [
            producer.send(topic, value, partition=number % partitions)
            for number, value in enumerate(values)
        ]
        placed = [each.get(timeout=30) for each in sent]
    return [(at.partition, at.offset, value) for at, value in zip(placed, values, strict=True)]


def consume(broker: Broker, topic: str, partitions: int) -> list[Record]:
    parts = [TopicPartition(topic, number) for number in range(partitions)]
    with closing(KafkaConsumer(bootstrap_servers=broker.bootstrap)) as consumer:
        consumer.assign(parts)
        consumer.seek_to_beginning(*parts)
        left = sum(consumer.end_offsets(parts).values())
        records: list[Record] = []
        while len(records) < left:
            batches = consumer.poll(timeout_ms=1000).values()
            records += [(each.partition, each.offset, each.value) for b in batches for each in b]
    return sorted(records)


@pytest.fixture
def own_broker(tmp_path: Path, broker_jars: Path) -> Iterator[Broker]:
    """Yield a broker that a test may kill."""
    with Broker(tmp_path / "broker", broker_jars) as running:
        yield running


def test_records_come_back_as_they_were_sent(broker: Broker) -> None:
    broker.create_topic("round-trip", partitions=3)
    values = [f"record {number}".encode() for number in range(100)]
    sent = produce(broker, "round-trip", values, partitions=3)
    assert consume(broker, "round-trip", partitions=3) == sorted(sent)


def test_a_topic_is_created_once(broker: Broker) -> None:
    broker.create_topic("only-one")
    with pytest.raises(TopicAlreadyExistsError):
        broker.create_topic("only-one")


def test_old_records_are_kept(broker: Broker) -> None:
    """A log of years ago must not run into the broker's retention."""
    broker.create_topic("old")
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        placed = producer.send("old", b"of 2001", timestamp_ms=1_000_000_000_000).get(timeout=30)
    assert placed.timestamp == 1_000_000_000_000
    assert consume(broker, "old", partitions=1) == [(0, 0, b"of 2001")]


def test_acknowledged_records_survive_sigkill(own_broker: Broker) -> None:
    own_broker.create_topic("kept", partitions=2)
    sent = produce(own_broker, "kept", [b"%d" % number for number in range(100)], partitions=2)
    address = own_broker.bootstrap
    own_broker.kill()
    assert not own_broker.running
    began = time.monotonic()
    own_broker.start()
    assert time.monotonic() - began < 15
    assert own_broker.bootstrap == address
    assert consume(own_broker, "kept", partitions=2) == sorted(sent)


def test_a_broker_that_cannot_start_says_why_and_leaves_no_process(own_broker: Broker) -> None:
    own_broker.stop()
    host, _, port = own_broker.bootstrap.partition(":")
    why = pytest.raises(RunFailedError, match=r"does not start: .*Address already in use")
    with socket.create_server((host, int(port))), why:
        own_broker.start()
    assert not own_broker.running
    own_broker.start()


def test_a_folder_has_one_broker(own_broker: Broker, broker_jars: Path) -> None:
    """Kafka itself lets the second one write to the metadata log before it finds the port taken."""
    rival = Broker(own_broker.home, broker_jars)
    with pytest.raises(RunFailedError, match="another Kafka broker runs in"):
        rival.start()
    assert not rival.running
    assert own_broker.running


def test_stopping_twice_is_fine(tmp_path: Path, broker_jars: Path) -> None:
    broker = Broker(tmp_path, broker_jars)
    broker.stop()
    broker.start()
    broker.stop()
    broker.stop()
    assert not broker.running


PARENT = """
import sys, time
from pathlib import Path
from pipeline.demo.broker import Broker
broker = Broker(Path(sys.argv[1]), Path(sys.argv[2]))
broker.start()
print(broker._process.pid, flush=True)
time.sleep(600)
"""


@contextmanager
def parent_of_a_broker(home: Path, jars: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", PARENT, str(home), str(jars)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())
        parent.kill()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie only waits for init


def test_the_broker_dies_with_a_killed_parent(tmp_path: Path, broker_jars: Path) -> None:
    with parent_of_a_broker(tmp_path / "broker", broker_jars) as (parent, pid):
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid)
