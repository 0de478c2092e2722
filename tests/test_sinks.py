import json
import random
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import NewTopic

from pipeline.demo.broker import Broker
from schemas.errors import ConfigurationError
from transforms.delivery.sinks import DeliveryError, check_sink, open_sink

Record = tuple[bytes, bytes, list[tuple[str, bytes]]]


def consumed(broker: Broker, topic: str) -> list[Record]:
    """Every record of a topic, by its own client."""
    with closing(KafkaConsumer(bootstrap_servers=broker.bootstrap)) as consumer:
        parts = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(parts)
        consumer.seek_to_beginning(*parts)
        left = sum(consumer.end_offsets(parts).values())
        records: list[Record] = []
        while len(records) < left:
            batches = consumer.poll(timeout_ms=1000).values()
            records += [(each.key, each.value, list(each.headers)) for b in batches for each in b]
    return sorted(records)


def topics(broker: Broker) -> list[str]:
    with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap)) as client:
        return list(client.list_topics())


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text()), max_size=9))
def test_lines_of_a_file_are_what_was_sent(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict]
) -> None:
    path = tmp_path_factory.mktemp("sink") / "made" / "on the way" / "alerts.jsonl"
    sink = open_sink(str(path))
    for value in values:
        sink.send(b"key", json.dumps(value).encode())
    assert sink.flush() == len(values)
    assert sink.flush() == 0
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    assert [json.loads(line) for line in lines] == values


def test_a_file_is_appended_to_and_only_flushes_count(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    for number in range(3):
        sink = open_sink(str(path))
        sink.send(b"k", b'{"n":%d}' % number, [("h", b"v")])
        before = path.read_bytes() if path.exists() else b""
        assert b'{"n":%d}' % number not in before
        assert sink.flush() == 1
    assert path.read_bytes() == b'{"n":0}\n{"n":1}\n{"n":2}\n'


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", b""),
        (b'{"n":0}\n', b'{"n":0}\n'),
        (b'{"n":0}\n{"n":', b'{"n":0}\n'),
        (b'{"n":0}\n{"a":"\xc3', b'{"n":0}\n'),
        (b'{"torn', b""),
        (b'{"n":0}\n{"by":"hand"}', b'{"n":0}\n{"by":"hand"}\n'),
    ],
)
def test_a_line_torn_by_a_crash_does_not_spoil_the_next(
    tmp_path: Path, before: bytes, kept: bytes
) -> None:
    path = tmp_path / "alerts.jsonl"
    path.write_bytes(before)
    sink = open_sink(str(path))
    sink.send(b"k", b'{"n":1}')
    assert sink.flush() == 1
    assert path.read_bytes() == kept + b'{"n":1}\n'


def test_threads_share_a_file_without_mixing_lines(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"

    def write(thread: int) -> None:
        sink = open_sink(str(path))
        for number in range(20):
            sink.send(b"k", json.dumps({"t": thread, "n": number, "pad": "x" * 9000}).encode())
            sink.flush()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(line["t"], line["n"]) for line in map(json.loads, path.read_text().splitlines())]
    assert sorted(found) == [(t, n) for t in range(4) for n in range(20)]
    assert all([n for t, n in found if t == thread] == list(range(20)) for thread in range(4))


def test_a_value_of_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one line"):
        open_sink(str(tmp_path / "alerts.jsonl")).send(b"k", b"a\nb")


def test_a_file_that_cannot_be_appended_to_is_a_delivery_error(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    sink = open_sink(str(folder / "alerts.jsonl"))
    folder.rmdir()
    sink.send(b"k", b"{}")
    with pytest.raises(DeliveryError, match="No such file"):
        sink.flush()


def test_a_good_path_passes_the_preflight(tmp_path: Path) -> None:
    path = tmp_path / "a" / "alerts.jsonl"
    check_sink(str(path))
    path.write_bytes(b'{"n":0}\n')
    check_sink(str(path))
    assert path.read_bytes() == b'{"n":0}\n'


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alerts.json", "neither a topic nor a .jsonl file"),
        ("file/alerts.jsonl", "cannot write to"),
        ("folder.jsonl", "cannot write to"),
    ],
)
def test_an_unwritable_path_is_named_before_the_run(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigurationError, match=says) as caught:
        check_sink(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_range_of_a_topic_to_write_to_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="drop start= and end="):
        open_sink("kafka://localhost:9092/alerts?start=latest")


def test_an_unreachable_broker_is_reported_within_ten_seconds(closed_port: int) -> None:
    began = time.monotonic()
    with pytest.raises(
        ConfigurationError, match=r"no Kafka broker answers at 127\.0\.0\.1"
    ) as caught:
        check_sink(f"kafka://127.0.0.1:{closed_port}/alerts")
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)


def test_a_missing_topic_is_reported_and_not_created(broker: Broker) -> None:
    with pytest.raises(ConfigurationError, match="topic 'not-there' does not exist"):
        check_sink(f"kafka://{broker.bootstrap}/not-there")
    assert "not-there" not in topics(broker)


def test_records_of_a_topic_are_what_was_sent(broker: Broker) -> None:
    broker.create_topic("sink-alerts", 3)
    uri = f"kafka://{broker.bootstrap}/sink-alerts"
    check_sink(uri)
    sent = [
        (b"key %d" % number, b'{"n":%d}' % number, [("alert-id", b"%d" % number)])
        for number in range(500)
    ]
    sink = open_sink(uri)
    for record in sent[:300]:
        sink.send(*record)
    assert sink.flush() == 300
    other = open_sink(uri)
    for record in sent[300:]:
        other.send(*record)
    assert other.flush() == 200
    assert (sink.flush(), other.flush()) == (0, 0)
    assert consumed(broker, "sink-alerts") == sorted(sent)


def test_a_refused_record_is_a_delivery_error_and_the_next_one_is_delivered(
    broker: Broker,
) -> None:
    broker.create_topic("sink-large", 1)
    sink = open_sink(f"kafka://{broker.bootstrap}/sink-large")
    with pytest.raises(DeliveryError, match="maximum request size"):
        sink.send(b"k", b"x" * 2_000_000)
    sink.send(b"k", b"{}")
    assert sink.flush() == 1
    assert consumed(broker, "sink-large") == [(b"k", b"{}", [])]


def test_what_the_broker_refuses_is_not_counted_and_the_sink_recovers(broker: Broker) -> None:
    topic = NewTopic("sink-small", 1, 1, topic_configs={"max.message.bytes": "200"})
    with closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap)) as client:
        client.create_topics([topic])
    broker.create_topic("sink-other", 1)
    small = open_sink(f"kafka://{broker.bootstrap}/sink-small")
    other = open_sink(f"kafka://{broker.bootstrap}/sink-other")
    other.send(b"k", b'{"n":0}')
    assert other.flush() == 1
    small.send(b"k", random.Random(0).randbytes(5000))
    with pytest.raises(DeliveryError, match="sink-small did not acknowledge"):
        small.flush()
    small.send(b"k", b'{"n":1}')
    other.send(b"k", b'{"n":2}')
    assert (small.flush(), other.flush()) == (1, 1)
    assert consumed(broker, "sink-small") == [(b"k", b'{"n":1}', [])]
    assert consumed(broker, "sink-other") == [(b"k", b'{"n":0}', []), (b"k", b'{"n":2}', [])]
