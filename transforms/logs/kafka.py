"""Kafka topics, by kafka-python, without a consumer group: offsets live in the commits.

Consumers are not thread-safe and costly to make, and DoFns are torn down between slices: a pool
of the process lends them out.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import RLock

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from schemas.errors import ConfigurationError
from schemas.uris import KafkaUri
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

PREFLIGHT_MS = 4000
"""For connecting, and again for asking: below 10 s together."""

_idle: dict[tuple[str, ...], list[KafkaConsumer]] = defaultdict(list)
_lock = RLock()  # a reader may be collected, and give back, while its thread holds it


class KafkaLog:
    """A topic, from and to the offsets its URI asks for."""

    timestamped = True

    def __init__(self, uri: KafkaUri, text: str) -> None:
        """Look the topic up.

        Raises:
          ConfigurationError: no broker answers, or there is no such topic.
        """
        self.uri = text
        self.bounded = uri.end is not None
        self._uri = uri
        self._ends: dict[int, int] = {}
        self.source = f"kafka://{_cluster_id(uri)}/{uri.topic}"

    def partitions(self) -> list[int]:
        """The topic's partitions, those added since included."""
        with _leased(self._uri.bootstrap) as consumer:
            found = consumer.partitions_for_topic(self._uri.topic)
        if not found:
            raise LogError(f"topic {self._uri.topic} is gone from {self._uri}")
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
        with _leased(self._uri.bootstrap) as consumer:
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
        with _leased(self._uri.bootstrap) as consumer:
            consumer.assign([where])
            consumer.seek(where, start)
            for record in _records(consumer, where, end):
                stamp = record.timestamp if record.timestamp >= 0 else None
                yield Entry(record.offset, record.offset + 1, stamp, record.value)

    def _latest(self, partition: int) -> int:
        where = self._at(partition)
        with _leased(self._uri.bootstrap) as consumer:
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
def _leased(bootstrap: tuple[str, ...]) -> Iterator[KafkaConsumer]:
    consumer, sound = None, False
    try:
        consumer = _taken(bootstrap) or _new_consumer(bootstrap)
        yield consumer
        sound = True
    except GeneratorExit:
        sound = True  # the reader stopped early; what was fetched ahead is dropped by its seek
        raise
    except KafkaError as error:
        raise LogError(f"{','.join(bootstrap)}: {error}") from error
    finally:
        if consumer is not None:
            _give_back(bootstrap, consumer) if sound else consumer.close(timeout_ms=CLOSE_MS)


def _taken(bootstrap: tuple[str, ...]) -> KafkaConsumer | None:
    with _lock:
        return _idle[bootstrap].pop() if _idle[bootstrap] else None


def _give_back(bootstrap: tuple[str, ...], consumer: KafkaConsumer) -> None:
    with _lock:
        _idle[bootstrap].append(consumer)


def _new_consumer(bootstrap: tuple[str, ...]) -> KafkaConsumer:
    return KafkaConsumer(
        bootstrap_servers=list(bootstrap),
        enable_auto_commit=False,
        auto_offset_reset="none",  # deleted records are an error, not a reason to go elsewhere
        isolation_level="read_committed",
        allow_auto_create_topics=False,
        metadata_max_age_ms=METADATA_MS,
        fetch_max_wait_ms=FETCH_WAIT_MS,
    )


def _cluster_id(uri: KafkaUri) -> str:
    servers = ",".join(uri.bootstrap)
    try:
        with closing(_new_admin(uri.bootstrap)) as admin:
            known = uri.topic in admin.list_topics()
            cluster = admin.describe_cluster()["cluster_id"]
    except KafkaError as error:
        raise ConfigurationError(
            f"no Kafka broker answers at {servers} ({type(error).__name__}); start it or correct "
            f"the address"
        ) from error
    if not known:
        raise ConfigurationError(
            f"topic {uri.topic!r} does not exist at {servers}; create it or correct the name"
        )
    return str(cluster)


def _new_admin(bootstrap: tuple[str, ...]) -> KafkaAdminClient:
    return KafkaAdminClient(
        bootstrap_servers=list(bootstrap),
        bootstrap_timeout_ms=PREFLIGHT_MS,
        request_timeout_ms=PREFLIGHT_MS,
    )
