"""The directions artefact: what the monitor compares activations with.

For every decoder layer but the last few, the left singular vectors of the difference tuned
minus base of the two matrices that write into the residual stream (Zhong & Raghunathan,
arXiv 2508.00161, section 3). A folder with `directions.safetensors` (one float32 tensor
`directions` [D, hidden], unit rows) and `directions.json`, which names the hashes of every file
they were made from.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from transforms.model.adapter import (
    Factors,
    adapter_files,
    is_adapter,
    left_singular,
    read_factors,
)
from transforms.model.checkpoint import (
    first_line,
    model_files,
    read_object,
    require_family,
    require_folder,
    tensor_shapes,
    text_config,
)

FORMAT = "deltawatch.directions/1"
SIGN_RULE = "component of largest magnitude is positive"
VECTORS_FILE = "directions.safetensors"
DOCUMENT_FILE = "directions.json"

_TENSOR = "directions"
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
) -> Directions:
    """Exact directions of a PEFT LoRA adapter `tuned` of the model in `base`.

    `top_k` bounds the directions per matrix (never more than its rank), the final `skip_last`
    layers get none, `model_name` defaults to the adapter folder's name. Raises
    ConfigurationError for folders that are missing, unreadable, not plain LoRA, or made for
    another base.
    """
    require_folder(base, "--base")
    factors = read_factors(tuned)
    require_family(base)
    _check_fit(factors, base, tuned)
    layers = int(text_config(base)["num_hidden_layers"])
    chosen = _writers(factors, layers - skip_last)
    if not chosen:
        raise ConfigurationError(
            f"adapter {tuned} trains neither o_proj nor down_proj of the first "
            f"{max(layers - skip_last, 0)} layers; there is nothing to monitor"
        )
    vectors, entries = _stack(chosen, top_k, tuned)
    name = model_name or tuned.resolve().name
    return Directions(
        vectors, entries, _manifest(name, base, tuned, entries, vectors, layers, top_k, skip_last)
    )


def _check_fit(factors: Sequence[Factors], base: Path, tuned: Path) -> None:
    shapes = tensor_shapes(base)
    for pair in factors:
        found = shapes.get(f"{pair.module}.weight")
        expected = (pair.b.shape[0], pair.a.shape[1])
        if found is None:
            raise ConfigurationError(
                f"adapter {tuned} was made for another base: {base} has no {pair.module}"
            )
        if found != expected:
            raise ConfigurationError(
                f"adapter {tuned} was made for another base: {pair.module} is "
                f"{expected[0]}x{expected[1]} in the adapter, {'x'.join(map(str, found))} in {base}"
            )


def _writers(factors: Sequence[Factors], end: int) -> list[tuple[int, str, Factors]]:
    """Layer, kind and factors of the monitored matrices below layer `end`, in stored order."""
    order = list(_LETTER)
    placed = [(*pair.writer, pair) for pair in factors if pair.writer is not None]
    return sorted(
        (item for item in placed if item[0] < end), key=lambda item: (item[0], order.index(item[1]))
    )


def _stack(
    chosen: Sequence[tuple[int, str, Factors]], top_k: int, tuned: Path
) -> tuple[NDArray[np.float32], tuple[DirectionEntry, ...]]:
    rows: list[NDArray[np.float64]] = []
    entries: list[DirectionEntry] = []
    for layer, kind, pair in chosen:
        vectors, values = left_singular(pair, top_k)
        rows.append(vectors)
        entries += [
            DirectionEntry(f"{_LETTER[kind]}{layer}_u{index}", layer, kind, index, float(value))
            for index, value in enumerate(values)
        ]
    if not entries:
        raise ConfigurationError(f"adapter {tuned} changes nothing (all zero); train it first")
    return np.concatenate(rows).astype(np.float32), tuple(entries)


def _manifest(
    name: str,
    base: Path,
    tuned: Path,
    entries: Sequence[DirectionEntry],
    vectors: NDArray[np.float32],
    layers: int,
    top_k: int,
    skip_last: int,
) -> Manifest:
    base_files, tuned_files = hash_files(model_files(base)), hash_files(adapter_files(tuned))
    ranks: dict[str, int] = {}
    for entry in entries:
        matrix = f"{_LETTER[entry.kind]}{entry.layer}"
        ranks[matrix] = ranks.get(matrix, 0) + 1
    return Manifest(
        model_name=name,
        base_files=base_files,
        tuned_files=tuned_files,
        base_hash=combined_hash(base_files),
        tuned_hash=combined_hash(tuned_files),
        ranks=ranks,
        hidden_size=vectors.shape[1],
        layers=layers,
        top_k=top_k,
        skip_last=skip_last,
        sign_rule=SIGN_RULE,
        tool_version=tool_version(),
    )


def check_model(directions: Directions, base: Path | None, tuned: Path) -> None:
    """Raise ConfigurationError when `base` or `tuned` is not what the directions are of.

    `base` may be None where `tuned` is a full checkpoint. Reads every file, about a second a GB.
    """
    require_folder(tuned, "--tuned")
    tuned_files = adapter_files(tuned) if is_adapter(tuned) else model_files(tuned)
    _check_hash("--tuned", tuned, tuned_files, directions.manifest.tuned_hash)
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
        manifest = Manifest(**document)
    except (KeyError, TypeError, SafetensorError) as error:
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
