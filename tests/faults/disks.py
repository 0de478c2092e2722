"""A small file system that can be filled: a tmpfs, mounted in the run's own namespace."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BLOCK = bytes(1 << 16)


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator["Disk"]:
    """Mount a file system at a folder, which is made; gone with its content at the end."""
    place.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True
    )
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Disk:
    """A file system with room, until it is filled."""

    def __init__(self, place: Path) -> None:
        self._filler = place / ".filler"

    def fill(self) -> None:
        """Leave not a single block free."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (len(_BLOCK), 4096, 1):
                with suppress(OSError):
                    while os.write(file.fileno(), _BLOCK[:size]) == size:
                        pass

    def empty(self) -> None:
        """Give the room back."""
        self._filler.unlink()
