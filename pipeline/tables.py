"""`[[models]]` in the configuration file: fine-tuned models that records name, a table each."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import ConfigurationError

_KEYS = ("name", "tuned", "directions", "ranges")
_SEVERAL = ("name", "tuned")
_MAY_BE_MISSING = "ranges"


@dataclass(frozen=True)
class Table:
    """A model as it was asked for.

    Attributes:
      names: what its records' model field may say, the first its name here; none: every record
        is its own.
      tuned: its checkpoint or adapters.
      directions: folder made by `directions`.
      ranges: folder made by `calibrate`; None: they are learned.
    """

    names: tuple[str, ...]
    tuned: tuple[Path, ...]
    directions: Path
    ranges: Path | None


def parse(value: Any, path: Path) -> tuple[Table, ...]:
    """The tables that the file at `path` has under `models`.

    Raises ConfigurationError where one has something else than it should, or a name stands twice.
    """
    where = f"--config {path}: [[models]]"
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise ConfigurationError(f"{where} has to be an array of tables")
    tables = tuple(_table(one, f"{where} number {n}") for n, one in enumerate(value, start=1))
    names = Counter(name for table in tables for name in table.names)
    name, times = names.most_common(1)[0]
    if times > 1:
        raise ConfigurationError(f"{where} has the name {name!r} twice; tell the models apart")
    return tables


def _table(value: Mapping[str, Any], where: str) -> Table:
    for key in value:
        if key not in _KEYS:
            raise ConfigurationError(f"{where} has {key!r}; it may have {', '.join(_KEYS)}")
    found = {key: tuple(_texts(value, key, where)) for key in _KEYS}
    for name in found["name"]:
        if not name.strip("."):  # it becomes a folder's
            raise ConfigurationError(f"{where}: {name!r} cannot be a model's name")
    return Table(
        found["name"],
        tuple(map(Path, found["tuned"])),
        Path(found["directions"][0]),
        Path(found["ranges"][0]) if found["ranges"] else None,
    )


def _texts(value: Mapping[str, Any], key: str, where: str) -> Iterator[str]:
    if key not in value:
        if key == _MAY_BE_MISSING:
            return
        raise ConfigurationError(f"{where} lacks {key!r}")
    given = value[key] if isinstance(value[key], list) and key in _SEVERAL else [value[key]]
    if not given or not all(isinstance(text, str) and text for text in given):
        raise ConfigurationError(f"{where}: {key} is not text")
    yield from given
