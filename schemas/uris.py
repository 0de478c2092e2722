"""Where records come from and go to: `kafka://host:port,host:port/topic?start=&end=` or a path.

Parsing is strict: what cannot be meant is refused before anything starts, as a
`ConfigurationError` of one line.
"""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from schemas.errors import ConfigurationError

_KAFKA = "kafka://"
_SHAPE = "write kafka://host:port[,host:port]/topic[?start=earliest&end=latest]"
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Kafka's own rule for topic names (org.apache.kafka.common.internals.Topic).
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_SERVER = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_OFFSET = re.compile(r"[0-9]{1,19}")
_MAX_OFFSET = 2**63 - 1
_MAX_PORT = 65535
_STARTS = ("earliest", "latest")
_ENDS = ("latest",)
_UNBOUNDED = "none"


@dataclass(frozen=True, slots=True)
class KafkaUri:
    """A topic and the part of it that is meant. Offsets count for every partition alike."""

    bootstrap: tuple[str, ...]  # "host:port", as written
    topic: str
    start: str | int = "earliest"  # "earliest", "latest" or the first offset
    end: str | int | None = None  # "latest" (as found when asked), the offset after the last, None

    def __str__(self) -> str:
        """The URI without its range, as one would write it."""
        return f"{_KAFKA}{','.join(self.bootstrap)}/{self.topic}"


@dataclass(frozen=True, slots=True)
class PathUri:
    """A file path, or a glob of paths where several files can be read."""

    path: str

    def __str__(self) -> str:
        """The path as written."""
        return self.path


def parse_uri(text: str) -> KafkaUri | PathUri:
    """What `text` names. Raises ConfigurationError for a malformed URI or an unknown scheme."""
    if text.startswith(_KAFKA):
        return _parse_kafka(text)
    if _OTHER_SCHEME.match(text):
        scheme = text.split("://", 1)[0]
        raise ConfigurationError(
            f"{text!r}: {scheme}:// is not supported; use kafka://host:port/topic or a file path"
        )
    if not text or "\0" in text:
        raise ConfigurationError(f"{text!r} is not a path; give a file path or kafka://...")
    return PathUri(text)


def _parse_kafka(text: str) -> KafkaUri:
    location, _, query = text.removeprefix(_KAFKA).partition("?")
    servers, _, topic = location.partition("/")
    start, end = _parse_range(text, query)
    return KafkaUri(_parse_bootstrap(text, servers), _parse_topic(text, topic), start, end)


def _parse_bootstrap(text: str, servers: str) -> tuple[str, ...]:
    parts = tuple(servers.split(","))
    for part in parts:
        match = _SERVER.fullmatch(part)
        if not match or not 0 < int(match[1]) <= _MAX_PORT:
            raise ConfigurationError(f"{text!r}: {part!r} is not host:port; {_SHAPE}")
    return parts


def _parse_topic(text: str, topic: str) -> str:
    if not _TOPIC.fullmatch(topic) or topic in (".", ".."):
        raise ConfigurationError(f"{text!r}: {topic!r} is not a topic name; {_SHAPE}")
    return topic


def _parse_range(text: str, query: str) -> tuple[str | int, str | int | None]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    wrong = sorted(set(options) - {"start", "end"})
    if wrong or len(options) != len(pairs):
        what = f"unknown option {wrong[0]!r}" if wrong else "an option is given twice"
        raise ConfigurationError(f"{text!r}: {what}; only start= and end=, once each, can be given")
    start = _parse_bound(text, "start", options.get("start", "earliest"), _STARTS)
    end_text = options.get("end", _UNBOUNDED)
    end = None if end_text == _UNBOUNDED else _parse_bound(text, "end", end_text, _ENDS)
    if isinstance(start, int) and isinstance(end, int) and end < start:
        raise ConfigurationError(f"{text!r}: end {end} is before start {start}; give end >= start")
    return start, end


def _parse_bound(text: str, name: str, value: str, words: tuple[str, ...]) -> str | int:
    if value in words:
        return value
    if _OFFSET.fullmatch(value) and int(value) <= _MAX_OFFSET:
        return int(value)
    allowed = ", ".join((*words, _UNBOUNDED) if name == "end" else words)
    raise ConfigurationError(f"{text!r}: {name}={value!r} is wrong; use {allowed} or an offset")
