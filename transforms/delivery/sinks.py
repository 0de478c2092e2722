"""Sinks for alerts and dead letters: a Kafka topic or a JSONL file, at least once.

A sink promises one thing: after `flush` has returned, everything sent before is where it
belongs, on every in-sync replica or on the disk. What a failed run has sent already is sent
again with the same id.
"""

import json
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.producer.future import FutureRecordMetadata

from schemas.client_properties import NOT_SECURED, ClientProperties, Settings
from schemas.errors import ConfigurationError, TransientError
from schemas.uris import KafkaUri, parse_uri
from transforms.kafka.clients import Brokers, UnreachableError, connect
from transforms.kafka.reasons import in_words
from transforms.kafka.topics import check_topic

Headers = Sequence[tuple[str, bytes]]

_SUFFIX = ".jsonl"
_LINGER_MS = 20
_DELIVERY_S = 120.0

_logger = logging.getLogger(__name__)
_files_lock = threading.Lock()
_producers_lock = threading.Lock()
_producers: dict[Brokers, tuple[Settings, KafkaProducer]] = {}


class DeliveryError(TransientError):
    """Something sent was not acknowledged; the work it came from must be done again."""


class Sink(Protocol):
    """Takes single-line JSON values; not thread-safe, make one per thread."""

    def send(self, key: bytes, value: bytes, headers: Headers = ()) -> None:
        """Hand over one value. Raises DeliveryError where that is refused at once."""

    def flush(self) -> int:
        """Wait until all is delivered; the number acknowledged since the last flush.

        Raises:
          DeliveryError: something was not; how much of the rest arrived is not known.
        """


def open_sink(uri: str, properties: ClientProperties = NOT_SECURED) -> Sink:
    """The sink a URI names: `kafka://host:port,host:port/topic` or a path ending in `.jsonl`.

    Raises:
      ConfigurationError: it names neither.
    """
    parsed = _parse(uri)
    if isinstance(parsed, KafkaUri):
        return _KafkaSink(parsed, properties)
    return _JsonlSink(parsed)


def check_sink(uri: str, properties: ClientProperties = NOT_SECURED) -> str:
    """Find out before a run whether a sink can be written to; takes at most 10 s.

    Returns:
      What it is, however it was named: `kafka://CLUSTER_ID/TOPIC`, or the file's path.

    Raises:
      ConfigurationError: malformed URI, no broker, no topic that this user can write to,
        unwritable path.
    """
    parsed = _parse(uri)
    if isinstance(parsed, KafkaUri):
        return f"kafka://{check_topic(parsed, properties, 'WRITE')}/{parsed.topic}"
    _check_file(parsed)
    return str(parsed.resolve())


def _parse(uri: str) -> KafkaUri | Path:
    parsed = parse_uri(uri)
    if isinstance(parsed, KafkaUri):
        if (parsed.start, parsed.end) != ("earliest", None):
            raise ConfigurationError(f"{uri!r}: records are only appended; drop start= and end=")
        return parsed
    if not parsed.path.endswith(_SUFFIX):
        raise ConfigurationError(
            f"{uri!r} is neither a topic nor a .jsonl file; "
            f"give kafka://host:port/topic or a path ending in {_SUFFIX}"
        )
    return Path(parsed.path)


def _check_file(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {str(path)!r} ({error.strerror}); "
            f"give a path in a folder this user may write to"
        ) from error


class _KafkaSink:
    def __init__(self, uri: KafkaUri, properties: ClientProperties) -> None:
        self._uri = uri
        self._brokers = Brokers(uri.bootstrap, properties)
        self._producer: KafkaProducer | None = None
        self._sent: list[FutureRecordMetadata] = []

    def send(self, key: bytes, value: bytes, headers: Headers = ()) -> None:
        try:
            if self._producer is None:
                self._producer = _lease(self._brokers)
            future = self._producer.send(self._uri.topic, value, key, list(headers))
        except (ConfigurationError, UnreachableError) as error:
            raise DeliveryError(str(error)) from error
        except KafkaError as error:
            raise self._failed(error) from error
        self._sent.append(future)

    def flush(self) -> int:
        if self._producer is None:
            return 0
        try:
            self._producer.flush(_DELIVERY_S)
            for future in self._sent:
                future.get(timeout=_DELIVERY_S)
        except KafkaError as error:
            raise self._failed(error) from error
        acknowledged = len(self._sent)
        self._reset()
        return acknowledged

    def _failed(self, error: KafkaError) -> DeliveryError:
        # An idempotent producer that lost a record may refuse all later ones: begin anew.
        if self._producer is not None:
            _discard(self._brokers, self._producer)
        self._reset()
        return DeliveryError(f"{self._uri} did not acknowledge: {in_words(error)}")

    def _reset(self) -> None:
        # Leased anew each time: another sink may have had to discard the shared producer.
        self._producer, self._sent = None, []


def _lease(brokers: Brokers) -> KafkaProducer:
    """The process's one producer for these brokers: DoFns come and go, connections need not.

    Once the settings have changed there is a new one; the former closes when no sink holds it.
    """
    settings = brokers.properties.read()
    with _producers_lock:
        made_with, producer = _producers.get(brokers, (None, None))
        if producer is None or made_with != settings:
            producer = _new_producer(brokers, settings)
            _producers[brokers] = (settings, producer)
        return producer


def _new_producer(brokers: Brokers, settings: Settings) -> KafkaProducer:
    return connect(
        KafkaProducer,
        brokers,
        settings,
        acks="all",
        enable_idempotence=True,
        linger_ms=_LINGER_MS,
        delivery_timeout_ms=int(_DELIVERY_S * 1000),
        allow_auto_create_topics=False,
    )


def _discard(brokers: Brokers, producer: KafkaProducer) -> None:
    with _producers_lock:
        if _producers.get(brokers, (None, None))[1] is producer:
            del _producers[brokers]
    with suppress(KafkaError):  # what it still holds has failed already
        producer.close(timeout=0)


class _JsonlSink:
    """Appends whole lines. One process at a time may write to a file, any number of threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        with _files_lock:
            _mend(path)

    def send(self, key: bytes, value: bytes, headers: Headers = ()) -> None:
        if b"\n" in value:
            raise ValueError("a value of a JSONL file is one line")
        self._lines.append(value + b"\n")

    def flush(self) -> int:
        lines, self._lines = self._lines, []
        if not lines:
            return 0
        try:
            with _files_lock, self._path.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DeliveryError(f"cannot append to {self._path}: {error.strerror}") from error
        return len(lines)


def _mend(path: Path) -> None:
    """End the last line: a crash may have torn it, and what comes next must not stick to it.

    A torn line was never acknowledged, so its record comes again and the line can go.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0) as content:
        start = content.rfind(b"\n") + 1
        last = content[start:]
        if not last:
            return
        if _is_json(last):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            _logger.warning("dropping a torn line of %d bytes at the end of %s", len(last), path)
            file.truncate(start)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
