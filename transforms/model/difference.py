"""Left singular vectors of the difference of two full checkpoints.

Matrices are read a few rows at a time, whatever the models' size and shards. Of a large one only
its Gram matrix is ever whole in memory (see `svd`).
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schemas.errors import ConfigurationError
from transforms.model import svd
from transforms.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from transforms.model.cache import Cache
from transforms.model.checkpoint import (
    CONFIG,
    StoredTensor,
    dimensions,
    layer_count,
    require_family,
    stored_tensors,
    tensors_of,
    text_config,
)
from transforms.model.pair import Pair, Survey, survey
from transforms.model.rounding import rounding_floor, rounding_noise
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

_DTYPES = ("F64", "F32", "BF16", "F16")

_Place = tuple[int, str]


def checkpoint_writers(base: Path, tuned: Path, cache: Cache) -> list[Writer]:
    """The matrices that write into the residual stream, as they stand in both checkpoints.

    Reads configurations and headers only; what is decomposed later goes through `cache`.
    Raises ConfigurationError for folders that are unreadable or incomplete, and for a `tuned` of
    another architecture or shape than `base`.
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
    return [_writer(where, matrix, after[where], cache) for where, matrix in before.items()]


def saved_writers(base: Path, adapter: Path, cache: Cache) -> list[Writer]:
    """Those an adapter brings whole, trained as they are (`modules_to_save` of PEFT).

    Raises ConfigurationError for an adapter of another base.
    """
    stored = stored_tensors(base)
    found = []
    for tensor in tensors_of(adapter / ADAPTER_WEIGHTS):
        name = tensor.name.removeprefix("base_model.model.")
        where = place(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if where is None:
            continue
        if name not in stored or stored[name].shape != tensor.shape:
            raise ConfigurationError(
                f"adapter {adapter} was made for another base: {base} has no {name} of "
                f"{dimensions(tensor.shape)}"
            )
        found.append(_writer(where, stored[name], tensor, cache))
    return found


def _writer(where: _Place, base: StoredTensor, tuned: StoredTensor, cache: Cache) -> Writer:
    return Writer(*where, partial(_decompose, base, tuned, cache))


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


def left_singular(pair: Pair, top_k: int) -> LeftSingular:
    """Left singular vectors of tuned minus base, both finite.

    The `top_k` largest, less those that cannot be told from rounding (see `rounding_floor`).
    """
    return _left_singular(pair, survey(pair), top_k)


def _left_singular(pair: Pair, seen: Survey, top_k: int) -> LeftSingular:
    if seen.is_cast:
        unchanged = np.empty((0, pair.shape[0])), np.empty(0)
        return LeftSingular(*unchanged, 0.0, _rounding(seen, floor=0.0, cut=0), 0.0)
    found = _leading(pair, seen, top_k)
    cut = min(top_k, *pair.shape) - len(found.values)
    return LeftSingular(
        fix_signs(found.vectors.numpy()),
        found.values.numpy(),
        found.energy,
        _rounding(seen, found.floor, cut),
        seen.length / seen.base_length if seen.base_length else math.inf,
        found.fallback,
    )


def _leading(pair: Pair, seen: Survey, top_k: int) -> svd.Leading:
    noise = rounding_noise(pair.pieces(), (seen.base_precision, seen.tuned_precision))
    small = min(pair.shape) <= svd.LAPACK_ROWS

    def floor(values: Tensor, energy: float) -> float:
        def rest(bound: float) -> float:
            unseen = max(0.0, energy - float(values.square().sum()))
            return math.sqrt(unseen + float(values[values <= bound].square().sum()))

        numerical = numerical_floor(1.0, pair.shape)
        smallest = float(values[0]) * (numerical if small else math.sqrt(numerical))
        return max(rounding_floor(noise, rest), smallest)

    if small:
        return svd.by_lapack(pair.difference(0, pair.shape[0]), top_k, floor)
    return svd.by_gram(svd.gram_of(pair.difference, pair.shape[0]), top_k, floor)


def _decompose(base: StoredTensor, tuned: StoredTensor, cache: Cache, top_k: int) -> LeftSingular:
    pair = _pair(base, tuned)
    return cache.get(f"{pair.digest()}-{top_k}", lambda: _checked(pair, base, tuned, top_k))


def _checked(pair: Pair, base: StoredTensor, tuned: StoredTensor, top_k: int) -> LeftSingular:
    seen = survey(pair)
    for stored, length in ((base, seen.base_length), (tuned, seen.tuned_length)):
        if not math.isfinite(length):
            raise ConfigurationError(f"NaN or Inf in {stored.name} of {stored.path}; save it again")
    if seen.length > max(seen.base_length, seen.tuned_length):
        raise ConfigurationError(
            f"{tuned.path} was made from another base: {tuned.name} is further from that in "
            f"{base.path} than either is from zero; give the model it was tuned from as --base"
        )
    return _left_singular(pair, seen, top_k)


def _pair(base: StoredTensor, tuned: StoredTensor) -> Pair:
    for stored in (base, tuned):
        if stored.dtype not in _DTYPES or len(stored.shape) != 2:
            raise ConfigurationError(
                f"{stored.name} in {stored.path} is {stored.dtype} {dimensions(stored.shape)}, "
                "not a plain matrix; give the checkpoint before it was quantised"
            )
    return Pair(base.rows, tuned.rows, (base.shape[0], base.shape[1]))


def _rounding(seen: Survey, floor: float, cut: int) -> Rounding:
    return Rounding(_name(seen.base_precision), _name(seen.tuned_precision), floor, cut)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
