"""Files of artefact folders: safetensors for arrays, JSON for words and numbers, never pickle.

Every artefact names the SHA-256 of what it was made from, so these helpers are shared by all
of them. Hashes are lower-case hexadecimal strings of 64 characters.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from schemas.errors import ConfigurationError, TransientError

_CHUNK_BYTES = 1 << 20


def tool_version() -> str:
    """Version of the installed tool, which every artefact names; "unknown" in a bare tree."""
    try:
        return metadata.version("deltawatch")
    except metadata.PackageNotFoundError:
        return "unknown"


def readable(paths: Sequence[Path]) -> list[Path]:
    """The same files, once each has been opened; ConfigurationError names one that cannot be.

    Libraries hide why: safetensors says of every file it cannot open that there is none.
    """
    for path in paths:
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigurationError(
                f"cannot read {path} ({error.strerror}); let the user that runs deltawatch read it"
            ) from None
    return list(paths)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces. Raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 per file name (last path component), sorted by name.

    Raises ValueError when two paths share a name, OSError when a file cannot be read.
    """
    names = [path.name for path in paths]
    if len(set(names)) != len(names):
        raise ValueError(f"two files of the same name among {sorted(names)}")
    return {path.name: sha256_file(path) for path in sorted(paths, key=lambda p: p.name)}


def canonical_json(obj: Any) -> bytes:
    """The one byte string an object has as JSON: sorted keys, no spaces, ASCII only.

    Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def combined_hash(mapping: Mapping[str, str]) -> str:
    """One SHA-256 for a set of named hashes; the order of the mapping does not matter."""
    return hashlib.sha256(canonical_json(dict(mapping))).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a crash leaves the old content or the new, never a mixture.

    The folder must exist. Raises OSError.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files only their owner can read; artefacts are shared like any other file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn an OSError of what writes `path` into TransientError.

    For writing inside a pipeline: Beam would make a RuntimeError of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise TransientError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON with sorted keys, atomically (see `write_bytes`)."""
    text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode("ascii"))


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, and ValueError for what is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
