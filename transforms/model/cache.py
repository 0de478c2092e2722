"""Results of matrices on disk, so that a run that was killed does not repeat what it had done.

A file per matrix, named by the hash of what the result depends on: both matrices' bytes, how many
vectors were asked for, and the version of the algorithm.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from schemas.artefacts import write_bytes
from transforms.model.svd import ALGORITHM
from transforms.model.writers import LeftSingular, Rounding

_REST = "rest"


class Cache:
    """Results by key, in a folder or, without one, nowhere."""

    def __init__(self, folder: Path | None = None) -> None:
        """Take the folder; it is made when there is something to keep."""
        self._folder = folder
        self.hits = 0

    def get(self, key: str, make: Callable[[], LeftSingular]) -> LeftSingular:
        """The result kept under `key`; it is made and kept where there is none.

        Raises OSError when the folder cannot be written, and what `make` raises.
        """
        if self._folder is None:
            return make()
        path = self._folder / f"{key}-v{ALGORITHM}.safetensors"
        found = _read(path)
        if found is not None:
            self.hits += 1
            return found
        made = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _bytes(made))
        return made

    def remove(self) -> None:
        """Delete what is kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _bytes(result: LeftSingular) -> bytes:
    rest = asdict(result)
    arrays = {name: np.ascontiguousarray(rest.pop(name)) for name in ("vectors", "values")}
    return safetensors_numpy.save(arrays, {_REST: json.dumps(rest)})


def _read(path: Path) -> LeftSingular | None:
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in ("vectors", "values")}
            rest = json.loads(file.metadata()[_REST])
    except (OSError, SafetensorError):  # none, or damaged: it is made again
        return None
    rounding = rest.pop("rounding")
    return LeftSingular(**arrays, rounding=rounding and Rounding(**rounding), **rest)
