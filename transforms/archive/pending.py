"""Names of the files in a slice's folder: `MODEL/WHAT-EPOCH.SUFFIX`."""

from pathlib import Path
from urllib.parse import quote, unquote

TABLES = "parquet"
RANGES = "safetensors"


def model_folder(folder: Path, model: str) -> Path:
    """Where one model's files lie in a slice's folder."""
    return folder / quote(model, safe="")


def pending_path(folder: Path, model: str, what: str, epoch: int, suffix: str) -> Path:
    """The file of `what` (a table's name, "closed" or "open") of one model and epoch."""
    return model_folder(folder, model) / f"{what}-{epoch}.{suffix}"


def model_of(path: Path) -> str:
    """The model's name, from a file's path."""
    return unquote(path.parent.name)


def what_of(path: Path) -> str:
    """The table's name, "closed" or "open"."""
    return path.stem.partition("-")[0]


def epoch_of(path: Path) -> int:
    """The epoch in a file's name; negative before 1970."""
    return int(path.stem.partition("-")[2])
