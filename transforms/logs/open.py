"""Logs by URI, and all logs of a job together."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from glob import glob
from pathlib import Path

from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.errors import ConfigurationError
from schemas.plan import PartitionId, PartitionProgress
from schemas.uris import KafkaUri, parse_uri
from transforms.logs.entries import Log
from transforms.logs.files import FileLog
from transforms.logs.kafka import KafkaLog


@lru_cache(maxsize=256)
def open_logs(text: str, properties: ClientProperties = NOT_SECURED) -> tuple[Log, ...]:
    """The logs a URI names: a topic, a file, or the files of a glob in the order of their names.

    Raises:
      ConfigurationError: malformed, no file, no broker, or no topic that this user can read.
    """
    uri = parse_uri(text)
    if isinstance(uri, KafkaUri):
        return (KafkaLog(uri, text, properties),)
    paths = [Path(text)] if Path(text).is_file() else sorted(map(Path, glob(text, recursive=True)))
    readable: tuple[Log, ...] = tuple(FileLog(path) for path in paths if path.is_file())
    if not readable:
        raise ConfigurationError(f"no file at {text}; give a .jsonl or .jsonl.gz path, or a glob")
    return readable


class Logs:
    """All partitions of a job's inputs."""

    def __init__(self, inputs: Iterable[str], properties: ClientProperties = NOT_SECURED) -> None:
        """Open them; raises ConfigurationError like `open_logs`, and where two are the same."""
        self._by_source: dict[str, Log] = {}
        for log in (log for text in inputs for log in open_logs(text, properties)):
            other = self._by_source.setdefault(log.source, log)
            if other is not log:
                raise ConfigurationError(f"{other.uri} and {log.uri} are the same log; give one")

    @property
    def sources(self) -> frozenset[str]:
        """Names of the logs."""
        return frozenset(self._by_source)

    @property
    def places(self) -> frozenset[str]:
        """What is read, however it was named: `kafka://CLUSTER_ID/TOPIC`, or a file's path."""
        return frozenset(
            log.source if log.timestamped else str(Path(log.uri).resolve())
            for log in self._by_source.values()
        )

    def log(self, partition: PartitionId) -> Log:
        """The log a partition belongs to."""
        return self._by_source[partition.source]

    def partitions(self) -> list[PartitionId]:
        """All partitions there are now, sorted."""
        return sorted(
            PartitionId(source, number)
            for source, log in self._by_source.items()
            for number in log.partitions()
        )

    def end(self, partition: PartitionId) -> int:
        """The offset after a partition's last entry."""
        return self.log(partition).end(partition.partition)

    def earliest(self, partition: PartitionId) -> int:
        """The first offset of a partition that is kept."""
        return self.log(partition).earliest(partition.partition)

    def remaining(self, progress: Sequence[PartitionProgress]) -> dict[PartitionId, int]:
        """Offsets not yet read, per partition: records of a topic, bytes of a file."""
        return {each.id: max(self.end(each.id) - each.offset, 0) for each in progress}
