"""The directions artefact: what the monitor compares activations with.

For every decoder layer but the last few, the left singular vectors of the difference tuned
minus base of the two matrices that write into the residual stream (Zhong & Raghunathan,
arXiv 2508.00161, section 3). A folder with `directions.safetensors` (one float32 tensor
`directions` [D, hidden], unit rows) and `directions.json`, which names the hashes of every file
they were made from.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from schemas.artefacts import (
    canonical_json,
    combined_hash,
    hash_files,
    tool_version,
    write_bytes,
    write_json,
)
from schemas.errors import ConfigurationError
from transforms.model.adapter import adapter_files, adapter_writers, is_adapter
from transforms.model.checkpoint import (
    family_of,
    first_line,
    layer_count,
    model_files,
    read_object,
    require_folder,
)
from transforms.model.difference import checkpoint_writers
from transforms.model.writers import LeftSingular, Rounding, Writer

FORMAT = "deltawatch.directions/1"
SIGN_RULE = "component of largest magnitude is positive"
VECTORS_FILE = "directions.safetensors"
DOCUMENT_FILE = "directions.json"

_TENSOR = "directions"
Progress = Callable[[int, int], None]
"""Told how many matrices are done, and of how many."""

_LETTER = {"o_proj": "O", "down_proj": "D"}  # also their order within a layer


@dataclass(frozen=True, slots=True)
class DirectionEntry:
    """Where a direction comes from."""

    name: str  # as in the paper: "O23_u6" is o_proj of layer 23, singular vector 6
    layer: int
    kind: str  # "o_proj" or "down_proj"
    index: int  # among the matrix's singular vectors, 0 for the largest singular value
    singular_value: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the directions were made from and how."""

    model_name: str
    base_files: Mapping[str, str]  # SHA-256 by file name
    tuned_files: Mapping[str, str]
    base_hash: str  # of base_files
    tuned_hash: str  # of tuned_files
    ranks: Mapping[str, int]  # directions kept per matrix, e.g. {"O23": 8}
    hidden_size: int
    layers: int  # of the whole model
    top_k: int
    skip_last: int  # final layers without directions
    sign_rule: str
    tool_version: str
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    """Per matrix of a full checkpoint; none for an adapter, nor in artefacts before there was."""


@dataclass(frozen=True)
class Directions:
    """Directions in stored order: by layer, o_proj before down_proj, then by index."""

    vectors: NDArray[np.float32]  # [D, hidden], unit rows
    entries: tuple[DirectionEntry, ...]
    manifest: Manifest

    def __len__(self) -> int:
        """How many directions there are."""
        return len(self.entries)

    @property
    def last_layer(self) -> int:
        """The last layer that has a direction; later ones need not be run."""
        return self.entries[-1].layer

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what the directions were made from, and of their names.

        Not of the vectors: their last bits depend on the machine's linear algebra, and ranges
        made on one machine must serve another.
        """
        manifest = self.manifest
        identity = {
            "format": FORMAT,
            "names": [entry.name for entry in self.entries],
            "base_hash": manifest.base_hash,
            "tuned_hash": manifest.tuned_hash,
            "top_k": manifest.top_k,
            "skip_last": manifest.skip_last,
            "sign_rule": manifest.sign_rule,
        }
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    def document(self) -> dict[str, Any]:
        """The content of directions.json."""
        return {
            "format": FORMAT,
            "vectors_sha256": hashlib.sha256(_vector_bytes(self.vectors)).hexdigest(),
            "directions": [asdict(entry) for entry in self.entries],
            **asdict(self.manifest),
        }


def compute_directions(
    base: Path,
    tuned: Path,
    top_k: int = 20,
    skip_last: int = 3,
    model_name: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Directions:
    """Exact directions of `tuned`, a PEFT LoRA adapter or a full checkpoint of the model in `base`.

    Args:
      base: folder of the model before fine-tuning.
      tuned: folder of the adapter or of the whole fine-tuned model.
      top_k: bound of the directions per matrix (never more than its rank, nor than what stands
        out of rounding, see `rounding`).
      skip_last: how many final layers get none.
      model_name: defaults to the name of the folder `tuned`.
      progress: called after every matrix.

    Raises:
      ConfigurationError: a folder is missing or unreadable, the adapter is not plain LoRA, the two
        are not of one base, or nothing in the monitored matrices was changed.
    """
    require_folder(base, "--base")
    require_folder(tuned, "--tuned")
    family_of(base)  # refuses one that is not known
    layers = layer_count(base)
    writers = adapter_writers(base, tuned) if is_adapter(tuned) else checkpoint_writers(base, tuned)
    chosen = _monitored(writers, layers - skip_last)
    if not chosen:
        raise ConfigurationError(
            f"{tuned} trains neither o_proj nor down_proj of the first "
            f"{max(layers - skip_last, 0)} layers; there is nothing to monitor"
        )
    found = _decompose(chosen, top_k, progress)
    entries = _entries(found)
    if not entries:
        raise ConfigurationError(_no_difference(base, tuned, found))
    vectors = np.concatenate([part.vectors for part in found.values()]).astype(np.float32)
    name = model_name or tuned.resolve().name
    manifest = _manifest(name, base, tuned, found, layers, top_k, skip_last)
    return Directions(vectors, entries, manifest)


def _monitored(writers: Sequence[Writer], end: int) -> list[Writer]:
    """The matrices of layers below `end`, in stored order."""
    order = list(_LETTER)
    below = (writer for writer in writers if writer.layer < end)
    return sorted(below, key=lambda writer: (writer.layer, order.index(writer.kind)))


def _decompose(
    writers: Sequence[Writer], top_k: int, progress: Progress
) -> dict[Writer, LeftSingular]:
    found = {}
    for done, writer in enumerate(writers, start=1):
        found[writer] = writer.decompose(top_k)
        progress(done, len(writers))
    return found


def _matrix(writer: Writer) -> str:
    """Its name as in the paper: "O23"."""
    return f"{_LETTER[writer.kind]}{writer.layer}"


def _entries(found: Mapping[Writer, LeftSingular]) -> tuple[DirectionEntry, ...]:
    return tuple(
        DirectionEntry(
            f"{_matrix(writer)}_u{index}", writer.layer, writer.kind, index, float(value)
        )
        for writer, part in found.items()
        for index, value in enumerate(part.values)
    )


def _no_difference(base: Path, tuned: Path, found: Mapping[Writer, LeftSingular]) -> str:
    rounded = [part.rounding for part in found.values() if part.rounding is not None]
    if not rounded:
        return f"adapter {tuned} changes nothing (all zero); train it first"
    where = f"between {tuned} and {base} in o_proj and down_proj of the monitored layers"
    if all(rounding.floor == 0 for rounding in rounded):
        return f"no difference {where}, at most another dtype; give the fine-tuned model as --tuned"
    return (
        f"no difference {where} that can be told from rounding (base {rounded[0].base_precision}, "
        f"tuned {rounded[0].tuned_precision}); give the adapter, or both as they were trained"
    )


def _manifest(
    name: str,
    base: Path,
    tuned: Path,
    found: Mapping[Writer, LeftSingular],
    layers: int,
    top_k: int,
    skip_last: int,
) -> Manifest:
    base_files, tuned_files = hash_files(model_files(base)), hash_files(_tuned_files(tuned))
    rounding = {_matrix(writer): part.rounding for writer, part in found.items() if part.rounding}
    return Manifest(
        model_name=name,
        base_files=base_files,
        tuned_files=tuned_files,
        base_hash=combined_hash(base_files),
        tuned_hash=combined_hash(tuned_files),
        ranks={_matrix(w): len(part.values) for w, part in found.items() if len(part.values)},
        hidden_size=int(next(iter(found.values())).vectors.shape[1]),
        layers=layers,
        top_k=top_k,
        skip_last=skip_last,
        sign_rule=SIGN_RULE,
        tool_version=tool_version(),
        rounding=rounding,
    )


def _tuned_files(tuned: Path) -> list[Path]:
    return adapter_files(tuned) if is_adapter(tuned) else model_files(tuned)


def check_model(directions: Directions, base: Path | None, tuned: Path) -> None:
    """Raise ConfigurationError when `base` or `tuned` is not what the directions are of.

    `base` may be None where `tuned` is a full checkpoint. Reads every file, about a second a GB.
    """
    require_folder(tuned, "--tuned")
    _check_hash("--tuned", tuned, _tuned_files(tuned), directions.manifest.tuned_hash)
    if base is not None:
        require_folder(base, "--base")
        _check_hash("--base", base, model_files(base), directions.manifest.base_hash)


def _check_hash(option: str, folder: Path, files: Sequence[Path], expected: str) -> None:
    if combined_hash(hash_files(files)) != expected:
        raise ConfigurationError(
            f"the directions were computed for another model: {option} {folder} differs; "
            "run `deltawatch directions` for this one"
        )


def save(directions: Directions, out: Path) -> None:
    """Write the artefact's two files into `out`, which is made if needed."""
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / VECTORS_FILE, _vector_bytes(directions.vectors))
    write_json(out / DOCUMENT_FILE, directions.document())


def load(folder: Path) -> Directions:
    """Read an artefact. ConfigurationError when missing, corrupt or of another version."""
    require_folder(folder, "--directions")
    document = read_object(folder / DOCUMENT_FILE, "directions")
    if document.pop("format", None) != FORMAT:
        raise ConfigurationError(f"{folder} is not {FORMAT}; run `deltawatch directions` again")
    data = _read_vectors(folder / VECTORS_FILE)
    if hashlib.sha256(data).hexdigest() != document.pop("vectors_sha256", None):
        raise ConfigurationError(
            _corrupt(folder, f"{VECTORS_FILE} is not the one it was saved with")
        )
    return _parse(folder, document, data)


def _parse(folder: Path, document: dict[str, Any], data: bytes) -> Directions:
    try:
        vectors = safetensors_numpy.load(data)[_TENSOR]
        entries = tuple(DirectionEntry(**entry) for entry in document.pop("directions"))
        rounding = document.pop("rounding", {}).items()
        parts = {matrix: Rounding(**part) for matrix, part in rounding}
        manifest = Manifest(**document, rounding=parts)
    except (AttributeError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigurationError(_corrupt(folder, first_line(error))) from error
    if vectors.shape != (len(entries), manifest.hidden_size):
        raise ConfigurationError(_corrupt(folder, f"{len(entries)} names for {vectors.shape}"))
    return Directions(vectors, entries, manifest)


def _read_vectors(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read directions {path}: {first_line(error)}") from error


def _corrupt(folder: Path, why: str) -> str:
    return f"directions {folder} are corrupt ({why}); run `deltawatch directions` again"


def _vector_bytes(vectors: NDArray[np.float32]) -> bytes:
    return safetensors_numpy.save({_TENSOR: np.ascontiguousarray(vectors)})
