"""JSONL files, plain or gzip. An offset is the byte at which a line starts, decompressed.

Reading a gzip file from an offset decompresses all that stands before it, so slices of a long
one cost more and more; decompress files of gigabytes first.
"""

import gzip
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

from schemas.artefacts import readable, sha256_file
from schemas.errors import ConfigurationError
from transforms.logs.entries import Entry

_CHUNK_BYTES = 1 << 20


class FileLog:
    """One file: a bounded log of one partition whose entries carry no time of their own."""

    bounded = True
    timestamped = False

    def __init__(self, path: Path) -> None:
        """Take a file. Raises ConfigurationError for one that cannot be opened."""
        self.uri = str(path)
        self._path = path
        readable([path])

    @cached_property
    def source(self) -> str:
        """Named by content, so that a moved file is the same log and a changed one another."""
        return f"file://{self._path.name}?sha256={sha256_file(self._path)[:16]}"

    def partitions(self) -> list[int]:
        """The only one."""
        return [0]

    def start(self, partition: int) -> int:
        """The beginning of the file."""
        return 0

    def earliest(self, partition: int) -> int:
        """The beginning of the file."""
        return 0

    def end(self, partition: int) -> int:
        """Size of the decompressed file. Raises ConfigurationError where it cannot be had."""
        return self._size

    def read(self, partition: int, start: int, end: int) -> Iterator[Entry]:
        """Lines that start in [start, end), without their line breaks."""
        with self._open() as file:
            file.seek(start)
            offset = start
            while offset < end and (line := file.readline()):
                yield Entry(offset, offset + len(line), None, line.rstrip(b"\r\n"))
                offset += len(line)

    @cached_property
    def _size(self) -> int:
        if self._path.suffix != ".gz":
            return self._path.stat().st_size
        try:
            with self._open() as file:
                while file.read(_CHUNK_BYTES):
                    pass
                return file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigurationError(
                f"{self._path} is not a whole gzip file ({error}); fetch it again, or decompress "
                f"what can be read of it"
            ) from None

    def _open(self) -> IO[bytes]:
        if self._path.suffix == ".gz":
            return gzip.open(self._path)  # type: ignore[return-value]
        return self._path.open("rb")
