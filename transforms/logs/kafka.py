"""Kafka topics, by kafka-python, without a consumer group: offsets live in the commits.

Consumers are not thread-safe and costly to make, and DoFns are torn down between slices: a pool
of the process lends them out.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from schemas.client_properties import ClientProperties, Settings
from schemas.errors import ConfigurationError
from schemas.uris import KafkaUri
from transforms.kafka.clients import Brokers, UnreachableError, connect
from transforms.kafka.reasons import in_words
from transforms.kafka.topics import check_topic
from transforms.logs.entries import Entry, LogError

POLL_MS = 100
STALL_SECONDS = 60
"""Without anything from the broker for so long, reading on is given up."""

METADATA_MS = 5000
"""How soon partitions that were added are seen."""

FETCH_WAIT_MS = 10
"""Only what is there already is ever read; a fetch beyond it would delay the next reader's."""

CLOSE_MS = 1000
"""For closing a consumer that failed."""

_idle: dict[Brokers, list[tuple[Settings, KafkaConsumer]]] = defaultdict(list)
_lock = RLock()  # a reader may be collected, and give back, while its thread holds it


class KafkaLog:
    """A topic, from and to the offsets its URI asks for."""

    timestamped = True

    def __init__(self, uri: KafkaUri, text: str, properties: ClientProperties) -> None:
        """Look the topic up.

        Raises:
          ConfigurationError: no broker lets this user in, or the user cannot read the topic.
        """
        self.uri = text
        self.bounded = uri.end is not None
        self._uri = uri
        self._brokers = Brokers(uri.bootstrap, properties)
        self._ends: dict[int, int] = {}
        self.source = f"kafka://{check_topic(uri, properties, 'READ')}/{uri.topic}"

    def partitions(self) -> list[int]:
        """The topic's partitions, those added since included."""
        with _leased(self._brokers) as consumer:
            found = consumer.partitions_for_topic(self._uri.topic)
        if not found:
            raise LogError(f"{self._uri} is gone, or this user may no longer see it")
        return sorted(found)

    def start(self, partition: int) -> int:
        """The URI's start, at the earliest what is kept."""
        if self._uri.start == "latest":
            return self._latest(partition)
        earliest = self.earliest(partition)
        return earliest if self._uri.start == "earliest" else max(int(self._uri.start), earliest)

    def earliest(self, partition: int) -> int:
        """The first offset the broker keeps."""
        where = self._at(partition)
        with _leased(self._brokers) as consumer:
            return int(consumer.beginning_offsets([where])[where])

    def end(self, partition: int) -> int:
        """The URI's end; `latest` is what it was when asked first."""
        if self._uri.end is None:
            return self._latest(partition)
        if partition not in self._ends:
            latest = self._latest(partition)
            self._ends[partition] = (
                latest if self._uri.end == "latest" else min(int(self._uri.end), latest)
            )
        return self._ends[partition]

    def read(self, partition: int, start: int, end: int) -> Iterator[Entry]:
        """Records at [start, end); control records and compacted ones leave gaps."""
        where = self._at(partition)
        with _leased(self._brokers) as consumer:
            consumer.assign([where])
            consumer.seek(where, start)
            for record in _records(consumer, where, end):
                stamp = record.timestamp if record.timestamp >= 0 else None
                yield Entry(record.offset, record.offset + 1, stamp, record.value)

    def _latest(self, partition: int) -> int:
        where = self._at(partition)
        with _leased(self._brokers) as consumer:
            return int(consumer.end_offsets([where])[where])

    def _at(self, partition: int) -> TopicPartition:
        return TopicPartition(self._uri.topic, partition)


def _records(consumer: KafkaConsumer, where: TopicPartition, end: int) -> Iterator:
    heard = time.monotonic()
    while (position := consumer.position(where)) < end:
        for record in consumer.poll(timeout_ms=POLL_MS).get(where, ()):
            if record.offset >= end:
                return
            yield record
        # The position also moves over what is not handed out, e.g. transaction markers.
        if consumer.position(where) > position:
            heard = time.monotonic()
        elif time.monotonic() - heard > STALL_SECONDS:
            raise LogError(f"{where} gave nothing after offset {position} for {STALL_SECONDS} s")


@contextmanager
def _leased(brokers: Brokers) -> Iterator[KafkaConsumer]:
    settings: Settings = {}
    consumer, sound = None, False
    try:
        settings = brokers.properties.read()
        consumer = _taken(brokers, settings) or _new_consumer(brokers, settings)
        yield consumer
        sound = True
    except GeneratorExit:
        sound = True  # the reader stopped early; what was fetched ahead is dropped by its seek
        raise
    except KafkaError as error:
        raise LogError(f"{brokers}: {in_words(error)}") from error
    except (ConfigurationError, UnreachableError) as error:
        raise LogError(str(error)) from error
    finally:
        if consumer is not None and sound:
            _give_back(brokers, settings, consumer)
        elif consumer is not None:
            consumer.close(timeout_ms=CLOSE_MS)


def _taken(brokers: Brokers, settings: Settings) -> KafkaConsumer | None:
    """An idle consumer; those made before the settings changed are closed."""
    with _lock:
        while _idle[brokers]:
            made_with, consumer = _idle[brokers].pop()
            if made_with == settings:
                return consumer
            consumer.close(timeout_ms=CLOSE_MS)
    return None


def _give_back(brokers: Brokers, settings: Settings, consumer: KafkaConsumer) -> None:
    with _lock:
        _idle[brokers].append((settings, consumer))


def _new_consumer(brokers: Brokers, settings: Settings) -> KafkaConsumer:
    return connect(
        KafkaConsumer,
        brokers,
        settings,
        enable_auto_commit=False,
        auto_offset_reset="none",  # deleted records are an error, not a reason to go elsewhere
        isolation_level="read_committed",
        allow_auto_create_topics=False,
        metadata_max_age_ms=METADATA_MS,
        fetch_max_wait_ms=FETCH_WAIT_MS,
    )
