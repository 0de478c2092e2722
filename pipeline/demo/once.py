"""Folders that are expensive to make are made once, whole, by one process."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, calling `build` with an empty folder to fill if it does not exist yet.

    A folder that exists is complete: it gets its name by a rename, after `build` has returned.
    Processes that ask at the same time wait for the one that builds.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_beside(folder, "lock")):
        if not folder.exists():
            _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    partial = _beside(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)  # left over from a process that was killed
    partial.mkdir()
    try:
        build(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
