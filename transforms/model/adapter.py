"""Left singular vectors of a LoRA difference, from the adapter's two factors.

The difference of a matrix is `scaling * B @ A` with B [out, r] and A [r, in] (Hu et al. 2021,
arXiv 2106.09685; scaling lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA,
Kalajdzievski 2023, arXiv 2312.03732). It is never built: with QR of both factors,
B = Qb Rb and A^T = Qa Ra, the difference is Qb (scaling Rb Ra^T) Qa^T, so the SVD of the r x r
matrix in the middle gives the singular values, and Qb times its left vectors the directions.
All of it in float64, whatever the adapter is stored in.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.errors import ConfigurationError
from transforms.model.checkpoint import (
    dimensions,
    first_line,
    read_object,
    readable,
    stored_tensors,
    tokenizer_files,
)
from transforms.model.writers import (
    WRITERS,
    LeftSingular,
    Writer,
    fix_signs,
    numerical_floor,
    place,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("peft_type", lambda v: v != "LORA", "it is not a LoRA adapter"),
    ("use_dora", bool, "DoRA rescales the weights, its difference is not low-rank"),
    ("use_qalora", bool, "QA-LoRA pools the inputs, its difference is not B @ A"),
    ("use_bdlora", bool, "block-diagonal LoRA is not B @ A"),
    ("kasa_config", bool, "KaSA changes the base weights"),
    ("monteclora_config", bool, "MonteCLoRA samples its factors"),
    ("arrow_config", bool, "Arrow routes between adapters per token"),
    ("alora_invocation_tokens", bool, "an activated LoRA acts on part of the tokens only"),
    ("layer_replication", bool, "replicated layers do not exist in the base"),
    ("target_parameters", bool, "adapters of bare parameters have no module to compare"),
    ("fan_in_fan_out", bool, "transposed weights are not supported"),
    ("lora_bias", bool, "trained biases have no directions"),
    ("bias", lambda v: v != "none", "trained biases have no directions"),
    ("modules_to_save", lambda v: _saves_writer(v), "fully trained matrices are not low-rank"),
    ("init_lora_weights", lambda v: v not in _PLAIN_STARTS, "its start changed the base weights"),
)
_DEFAULTS: Mapping[str, Any] = {"bias": "none"}


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of one matrix's difference."""

    module: str  # name in the base, e.g. "model.layers.3.mlp.down_proj"
    a: torch.Tensor  # [rank, in], as stored
    b: torch.Tensor  # [out, rank], as stored
    scaling: float


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter (and not a full checkpoint)."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_files(folder: Path) -> list[Path]:
    """The adapter's configuration, weights and, where it brings one, its tokenizer.

    Raises ConfigurationError when the weights are missing or a file cannot be read.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigurationError(f"{folder} has no {ADAPTER_WEIGHTS}; save it as safetensors")
    return readable([folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *tokenizer_files(folder)])


def adapter_writers(base: Path, adapter: Path) -> list[Writer]:
    """The adapter's matrices that write into the residual stream, in no order.

    Raises ConfigurationError, with the reason, for adapters whose difference is not plain
    `scaling * B @ A`, for unreadable or incomplete ones, and for one of another base.
    """
    factors = read_factors(adapter)
    _check_fit(factors, base, adapter)
    placed = [(place(pair.module), pair) for pair in factors]
    return [Writer(*found, partial(left_singular, pair)) for found, pair in placed if found]


def _check_fit(factors: Sequence[Factors], base: Path, adapter: Path) -> None:
    stored = stored_tensors(base)
    for pair in factors:
        found = stored.get(f"{pair.module}.weight")
        expected = (pair.b.shape[0], pair.a.shape[1])
        if found is None:
            raise ConfigurationError(
                f"adapter {adapter} was made for another base: {base} has no {pair.module}"
            )
        if found.shape != expected:
            raise ConfigurationError(
                f"adapter {adapter} was made for another base: {pair.module} is "
                f"{dimensions(expected)} in the adapter, {dimensions(found.shape)} in {base}"
            )


def read_factors(folder: Path) -> list[Factors]:
    """Every pair of factors in the adapter, by module name.

    Raises ConfigurationError, with the reason, for adapters whose difference is not plain
    `scaling * B @ A`, and for unreadable or incomplete ones.
    """
    _, weights, *_ = adapter_files(folder)
    config = read_object(folder / ADAPTER_CONFIG, "adapter configuration")
    _refuse_variants(folder, config)
    pairs = _pair_up(_load_tensors(weights))
    factors = []
    for module, pair in sorted(pairs.items()):
        if set(pair) != {"A", "B"}:
            raise ConfigurationError(f"{weights} has only one factor of {module}; save it again")
        scaling = _scaling(config, module, pair["A"].shape[0])
        factors.append(Factors(module, pair["A"], pair["B"], scaling))
    return factors


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    for field, refused, reason in _REFUSED:
        value = config.get(field, _DEFAULTS.get(field))
        if refused(value):
            raise ConfigurationError(
                f"adapter {folder} has {field}={value!r}: {reason}; use a plain LoRA adapter"
            )


def _saves_writer(modules: list[str] | None) -> bool:
    names = {part for path in WRITERS for part in path.split(".")}
    return any(name.rpartition(".")[2] in names for name in modules or ())


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"cannot read weights {path}: {first_line(error)}") from error


def _pair_up(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is not None:
            pairs.setdefault(match["module"], {})[match["factor"]] = tensor
    return pairs


def _scaling(config: Mapping[str, Any], module: str, stored_rank: int) -> float:
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != stored_rank:
        raise ConfigurationError(
            f"adapter's rank of {module} is {stored_rank} in its weights and {rank} in its "
            f"{ADAPTER_CONFIG}; take both files from the same training run"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that is the module's name or the end of it, as an expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def left_singular(factors: Factors, top_k: int) -> LeftSingular:
    """Left singular vectors of the difference that the factors make.

    As many as `top_k` or the numerical rank, whichever is smaller (see `numerical_floor`).
    Raises ConfigurationError for factors with NaN or infinity.
    """
    a, b = factors.a.double(), factors.b.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigurationError(f"adapter has NaN or Inf in {factors.module}; train it again")
    basis, right = torch.linalg.qr(b)
    _, left = torch.linalg.qr(a.T)
    u, values, _ = torch.linalg.svd(factors.scaling * right @ left.T)
    floor = numerical_floor(float(values[0]), (b.shape[0], a.shape[1]))
    kept = min(top_k, int((values > floor).sum()))
    vectors = (basis @ u[:, :kept]).T
    return LeftSingular(fix_signs(vectors.numpy()), values[:kept].numpy())
