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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.errors import ConfigurationError
from transforms.model.checkpoint import (
    CONFIG,
    first_line,
    read_object,
    require_folder,
    tokenizer_files,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

WRITERS: Mapping[str, str] = {"self_attn.o_proj": "o_proj", "mlp.down_proj": "down_proj"}
"""The matrices of a decoder layer that write into the residual stream, and their kinds."""

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_WRITER = re.compile(r"(?:.+\.)?layers\.(?P<layer>\d+)\.(?P<path>[^.]+\.[^.]+)")
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

    @property
    def writer(self) -> tuple[int, str] | None:
        """Layer and kind where the matrix writes into the residual stream, else None."""
        match = _WRITER.fullmatch(self.module)
        if match is None or match["path"] not in WRITERS:
            return None
        return int(match["layer"]), WRITERS[match["path"]]


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter (and not a full checkpoint)."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_files(folder: Path) -> list[Path]:
    """The adapter's configuration, weights and, where it brings one, its tokenizer.

    Raises ConfigurationError when configuration or weights are missing.
    """
    require_folder(folder, "--tuned")
    if not is_adapter(folder):
        raise ConfigurationError(_no_adapter(folder))
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigurationError(f"{folder} has no {ADAPTER_WEIGHTS}; save it as safetensors")
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *tokenizer_files(folder)]


def _no_adapter(folder: Path) -> str:
    if (folder / CONFIG).is_file():
        return f"--tuned {folder} is a full checkpoint; directions need a PEFT adapter folder"
    return f"--tuned {folder} has no {ADAPTER_CONFIG}; give a PEFT adapter folder"


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


def left_singular(factors: Factors, top_k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Left singular vectors [k, out] (unit rows) and singular values [k], largest first.

    k is `top_k` or the numerical rank, whichever is smaller; the rank counts singular values
    above s0 * max(in, out) * eps of float64 (the rule of LAPACK users, Golub & Van Loan 5.4.1).
    Raises ConfigurationError for factors with NaN or infinity.
    """
    a, b = factors.a.double(), factors.b.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigurationError(f"adapter has NaN or Inf in {factors.module}; train it again")
    basis, right = torch.linalg.qr(b)
    _, left = torch.linalg.qr(a.T)
    u, values, _ = torch.linalg.svd(factors.scaling * right @ left.T)
    floor = float(values[0]) * max(a.shape[1], b.shape[0]) * torch.finfo(torch.float64).eps
    kept = min(top_k, int((values > floor).sum()))
    vectors = (basis @ u[:, :kept]).T
    return fix_signs(vectors.numpy()), values[:kept].numpy()


def fix_signs(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn each row so that its component of largest magnitude is positive."""
    largest = np.abs(vectors).argmax(axis=1, keepdims=True)
    signs: NDArray[np.float64] = np.sign(np.take_along_axis(vectors, largest, axis=1))
    return vectors * signs
