"""Left singular vectors of the difference of two full checkpoints.

One matrix of each model is in memory at a time, whatever the models' size and shards. The
decomposition is exact, LAPACK in float64 on the CPU.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schemas.errors import ConfigurationError
from transforms.model.adapter import ADAPTER_CONFIG
from transforms.model.checkpoint import (
    CONFIG,
    StoredTensor,
    dimensions,
    layer_count,
    require_family,
    stored_tensors,
    text_config,
)
from transforms.model.rounding import precision, rounding_floor
from transforms.model.writers import (
    LeftSingular,
    Rounding,
    Writer,
    fix_signs,
    numerical_floor,
    place,
)

_SAME = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
"""Entries of config.json that no fine-tuning changes."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_Place = tuple[int, str]


def checkpoint_writers(base: Path, tuned: Path) -> list[Writer]:
    """The matrices that write into the residual stream, as they stand in both checkpoints.

    Reads configurations and headers only. Raises ConfigurationError for folders that are
    unreadable or incomplete, and for a `tuned` of another architecture or shape than `base`.
    """
    if not (tuned / CONFIG).is_file():
        raise ConfigurationError(
            f"--tuned {tuned} has neither {ADAPTER_CONFIG} nor {CONFIG}; give a PEFT adapter "
            "folder or a full checkpoint"
        )
    require_family(tuned)
    _check_configurations(base, tuned)
    before, after = _stored_writers(base), _stored_writers(tuned)
    for where, matrix in before.items():
        if after[where].shape != matrix.shape:
            raise ConfigurationError(
                f"--tuned {tuned} was made from another base: {after[where].name} is "
                f"{dimensions(after[where].shape)}, in --base {base} {dimensions(matrix.shape)}"
            )
    return [
        Writer(*where, partial(_decompose, matrix, after[where]))
        for where, matrix in before.items()
    ]


def _check_configurations(base: Path, tuned: Path) -> None:
    before, after = text_config(base), text_config(tuned)
    for key in _SAME:
        if before.get(key) != after.get(key):
            raise ConfigurationError(
                f"--tuned {tuned} was made from another base: its {key} is {after.get(key)}, that "
                f"of --base {base} is {before.get(key)}; give the model it was tuned from"
            )


def _stored_writers(folder: Path) -> Mapping[_Place, StoredTensor]:
    """Both matrices of every layer. A prefix before `layers` may differ between checkpoints."""
    found: dict[_Place, StoredTensor] = {}
    for name, tensor in stored_tensors(folder).items():
        where = place(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if where in found:
            raise ConfigurationError(
                f"{folder} has both {found[where].name} and {name}; save the language model alone"
            )
        if where is not None:
            found[where] = tensor
    for layer in range(layer_count(folder)):
        for kind in ("o_proj", "down_proj"):
            if (layer, kind) not in found:
                raise ConfigurationError(
                    f"{folder} has no {kind}.weight of layer {layer}; give the whole checkpoint, "
                    "not quantised and with the names of its family"
                )
    return found


def left_singular(base: Tensor, tuned: Tensor, top_k: int) -> LeftSingular:
    """Left singular vectors of tuned minus base, both [out, in] as stored and finite.

    The `top_k` largest, less those that cannot be told from rounding (see `rounding_floor`).
    """
    if _is_cast(base, tuned):
        unchanged = np.empty((0, base.shape[0])), np.empty(0)
        return LeftSingular(*unchanged, _rounding(base, tuned, floor=0.0, cut=0))
    u, values = _left_of(_difference(base, tuned))
    smallest = numerical_floor(float(values[0]), (base.shape[0], base.shape[1]))
    floor = max(rounding_floor(base, tuned, values), smallest)
    wanted = min(top_k, len(values))
    kept = min(wanted, int((values > floor).sum()))
    rounding = _rounding(base, tuned, floor, cut=wanted - kept)
    return LeftSingular(fix_signs(u[:, :kept].T.numpy()), values[:kept].numpy(), rounding)


def _decompose(base: StoredTensor, tuned: StoredTensor, top_k: int) -> LeftSingular:
    before, after = _read(base), _read(tuned)
    if _length(_difference(before, after)) > max(_length(before), _length(after)):
        raise ConfigurationError(
            f"{tuned.path} was made from another base: {tuned.name} is further from that in "
            f"{base.path} than either is from zero; give the model it was tuned from as --base"
        )
    return left_singular(before, after, top_k)


def _read(stored: StoredTensor) -> Tensor:
    tensor = stored.read()
    if tensor.dtype not in _DTYPES or tensor.ndim != 2:
        raise ConfigurationError(
            f"{stored.name} in {stored.path} is {_name(tensor.dtype)} {dimensions(stored.shape)}, "
            "not a plain matrix; give the checkpoint before it was quantised"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigurationError(f"NaN or Inf in {stored.name} of {stored.path}; save it again")
    return tensor


def _is_cast(base: Tensor, tuned: Tensor) -> bool:
    """Whether the two are the same, but for the precision that one of them was saved in."""
    kept = (precision(base), precision(tuned))
    return any(torch.equal(base.to(dtype), tuned.to(dtype)) for dtype in kept)


def _difference(base: Tensor, tuned: Tensor) -> Tensor:
    return tuned.double().sub_(base)


def _length(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _left_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (columns) and all singular values of a float64 matrix.

    A wide matrix is R^T Q^T with its transpose's QR, and has the left vectors and values of the
    small square R^T; Q is never formed. Both steps are backward stable, so this is as accurate as
    the SVD of the whole (Golub & Van Loan 8.6.3), at a fraction of its time and memory.
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u, values


def _rounding(base: Tensor, tuned: Tensor, floor: float, cut: int) -> Rounding:
    return Rounding(_name(precision(base)), _name(precision(tuned)), floor, cut)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
