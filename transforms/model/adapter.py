"""Left singular vectors of a LoRA difference, from the adapter's two factors.

The difference of a matrix is `scaling * B @ A` with B [out, r] and A [r, in] (Hu et al. 2021,
arXiv 2106.09685; scaling lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA,
Kalajdzievski 2023, arXiv 2312.03732). It is never built: with QR of both factors,
B = Qb Rb and A^T = Qa Ra, the difference is Qb (scaling Rb Ra^T) Qa^T, so the SVD of the r x r
matrix in the middle gives the singular values, and Qb times its left vectors the directions.
All of it in float64, whatever the adapter is stored in.

The rows of B are multiplied by the gains of a norm that follows the matrix (see `gains`), and
experts are put side by side (see `experts`), each with R of its own: Ra^T of A is all that is
needed of the input side.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.artefacts import readable
from schemas.errors import ConfigurationError
from transforms.model.checkpoint import (
    dimensions,
    family_of,
    first_line,
    read_object,
    require_folder,
    tensors_of,
    tokenizer_files,
)
from transforms.model.experts import Stack, split_fused
from transforms.model.families import FUSED, KINDS, Experts, Family, Place
from transforms.model.stored import StoredWriter, stored_writers
from transforms.model.writers import LeftSingular, Writer, fix_signs, numerical_floor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_Matrix = tuple[str, int]  # module, and the expert where it holds several
StoredWriters = Mapping[tuple[int, str], StoredWriter]

_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("peft_type", lambda v: v != "LORA", "it is not a LoRA adapter"),
    ("use_dora", bool, "DoRA scales every row of the merged weights, which is no low rank"),
    ("use_qalora", bool, "QA-LoRA pools the inputs, its difference is not B @ A"),
    ("use_bdlora", bool, "block-diagonal LoRA is not B @ A"),
    ("kasa_config", bool, "KaSA changes the base weights"),
    ("monteclora_config", bool, "MonteCLoRA samples its factors"),
    ("arrow_config", bool, "Arrow routes between adapters per token"),
    ("alora_invocation_tokens", bool, "an activated LoRA acts on part of the tokens only"),
    ("layer_replication", bool, "replicated layers do not exist in the base"),
    ("lora_bias", bool, "trained biases have no directions"),
    ("bias", lambda v: v != "none", "trained biases have no directions"),
    ("init_lora_weights", lambda v: v not in _PLAIN_STARTS, "its start changed the base weights"),
)
_DEFAULTS: Mapping[str, Any] = {"bias": "none"}
_NOT_SHARED = ("modules_to_save", "target_parameters", "trainable_token_indices")
"""What puts more beside the base than the factors of its linear layers."""


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


Tuned = Path | tuple[Path, ...]
"""A full checkpoint, an adapter, or several adapters in the order they were trained."""


def adapters_of(tuned: Tuned) -> tuple[Path, ...]:
    """The folders of the adapters; none where `tuned` is a full checkpoint.

    Raises ConfigurationError for a missing folder, and for several that are not all adapters.
    """
    folders = folders_of(tuned)
    for folder in folders:
        require_folder(folder, "--tuned")
        if len(folders) > 1 and not is_adapter(folder):
            raise ConfigurationError(
                f"--tuned {folder} has no {ADAPTER_CONFIG}; of several folders each must be an "
                "adapter, a full checkpoint stands alone"
            )
    return folders if is_adapter(folders[0]) else ()


def folders_of(tuned: Tuned) -> tuple[Path, ...]:
    """One folder or several."""
    return (tuned,) if isinstance(tuned, Path) else tuned


def check_shareable(folder: Path) -> None:
    """Raise ConfigurationError unless the adapter can stay beside a base that others share."""
    require_folder(folder, "tuned")
    if not is_adapter(folder):
        raise ConfigurationError(
            f"{folder} has no {ADAPTER_CONFIG}; several models have to be adapters over one base, "
            "watch a full checkpoint alone"
        )
    config = read_object(folder / ADAPTER_CONFIG, "adapter configuration")
    for name in _NOT_SHARED:
        if config.get(name):
            raise ConfigurationError(
                f"adapter {folder} has {name}={config[name]!r}, which only a model that is watched "
                "alone may have"
            )
    _, weights, *_ = adapter_files(folder)
    whole = [tensor.name for tensor in tensors_of(weights) if ".lora_" not in tensor.name]
    if whole:
        raise ConfigurationError(
            f"adapter {folder} brings {whole[0]} whole, which only that of a model that is watched "
            "alone may; save it with save_embedding_layers=False if no token was added"
        )


def adapter_files(folder: Path) -> list[Path]:
    """The adapter's configuration, weights and, where it brings one, its tokenizer.

    Raises ConfigurationError when the weights are missing or a file cannot be read.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigurationError(f"{folder} has no {ADAPTER_WEIGHTS}; save it as safetensors")
    return readable([folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *tokenizer_files(folder)])


def embedding_rows(adapter: Path, family: Family) -> int | None:
    """How many tokens an adapter brings embeddings of; None where the base's stay.

    PEFT stores them all where the vocabulary was resized before the training, LoRA or not.
    Raises ConfigurationError when the weights cannot be read.
    """
    name = re.compile(rf"(.+\.)?{re.escape(family.embedding)}\.(.+\.)?weight")
    _, weights, *_ = adapter_files(adapter)
    rows = (tensor.shape[0] for tensor in tensors_of(weights) if name.fullmatch(tensor.name))
    return next(rows, None)


def adapter_writers(base: Path, *adapters: Path) -> list[Writer]:
    """What adapters, one upon the other, change of all that writes into the residual stream.

    In no order. Their differences add up: B1 A1 + B2 A2 is [B1 B2] times A1 above A2.

    Raises ConfigurationError, with the reason, for adapters whose difference is not plain
    `scaling * B @ A`, for unreadable or incomplete ones, and for one of another base.
    """
    family, stored = family_of(base), stored_writers(base)
    found: dict[tuple[int, str], dict[_Matrix, list[Factors]]] = {}
    for adapter in adapters:
        experts: Counter[str] = Counter()
        for pair in read_factors(adapter, family, stored):
            place = family.place(pair.module)
            if place is None:
                continue
            where, matrix = (place.layer, place.kind), (pair.module, experts[pair.module])
            experts[pair.module] += 1
            _check_fit(pair, place, stored.get(where), base, adapter)
            found.setdefault(where, {}).setdefault(matrix, []).append(pair)
    return [
        Writer(*where, partial(_decompose, [*map(_sum, matrices.values())], stored[where]))
        for where, matrices in found.items()
    ]


def _sum(pairs: Sequence[Factors]) -> Factors:
    """Factors of what all pairs of one matrix make together."""
    if len(pairs) == 1:
        return pairs[0]
    a = torch.cat([pair.a.double() for pair in pairs])
    b = torch.cat([pair.scaling * pair.b.double() for pair in pairs], dim=1)
    return Factors(pairs[0].module, a, b, 1.0)


def _check_fit(
    pair: Factors, place: Place, writer: StoredWriter | None, base: Path, adapter: Path
) -> None:
    part = "0" if place.part == FUSED else place.part
    if writer is None or part not in writer.parts:
        raise ConfigurationError(
            f"adapter {adapter} was made for another base: {base} has no {pair.module}"
        )
    expected = (pair.b.shape[0], pair.a.shape[1])
    if writer.shape(part) != expected:
        raise ConfigurationError(
            f"adapter {adapter} was made for another base: {pair.module} is "
            f"{dimensions(expected)} in the adapter, {dimensions(writer.shape(part))} in {base}"
        )


def read_factors(folder: Path, family: Family, stored: StoredWriters) -> list[Factors]:
    """Every pair of factors in the adapter; of fused experts a pair for each.

    Args:
      folder: of the adapter.
      family: of its base.
      stored: what its base writes with.

    Raises ConfigurationError, with the reason, for adapters whose difference is not plain
    `scaling * B @ A`, and for unreadable or incomplete ones.
    """
    _, weights, *_ = adapter_files(folder)
    config = read_object(folder / ADAPTER_CONFIG, "adapter configuration")
    _refuse_variants(folder, config, family)
    pairs = _pair_up(_load_tensors(weights))
    factors = []
    for module, pair in sorted(pairs.items()):
        if set(pair) != {"A", "B"}:
            raise ConfigurationError(f"{weights} has only one factor of {module}; save it again")
        for name, a, b in _apart(module, pair["A"], pair["B"], family, stored):
            factors.append(Factors(name, a, b, _scaling(config, name, a.shape[0])))
    return factors


def _apart(
    module: str, a: torch.Tensor, b: torch.Tensor, family: Family, stored: StoredWriters
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Module and factors of one matrix each; nothing for parameters that do not write.

    PEFT names the factors of a bare parameter by its module, once more inside `base_layer` for
    every further parameter of it; their shapes say which is which.
    """
    name = module.replace(".base_layer", "")
    if not isinstance(family.mlp, Experts) or family.split(name)[1] != family.mlp.container:
        return [(module, a, b)]
    fused = f"{name}.{family.mlp.fused.rpartition('.')[2]}"
    place = family.place(fused)
    writer = None if place is None else stored.get((place.layer, place.kind))
    experts = 0 if writer is None else sum(part.isdecimal() for part in writer.parts)
    if writer is None or experts == 0 or a.shape[0] % experts:
        raise ConfigurationError(
            f"adapter was made for another base: it has {a.shape[0]} rows for all experts of "
            f"{name}, the base has {experts} experts there"
        )
    rows, columns = writer.shape("0")
    if (b.shape[0], a.shape[1]) == (2 * columns, rows):
        return []  # gate and up
    return [(fused, *pair) for pair in split_fused(a, b, experts)]


def _refuse_variants(folder: Path, config: Mapping[str, Any], family: Family) -> None:
    for field, refused, reason in _REFUSED:
        value = config.get(field, _DEFAULTS.get(field))
        if refused(value):
            raise ConfigurationError(
                f"adapter {folder} has {field}={value!r}: {reason}; use a plain LoRA adapter"
            )
    _refuse_norms(folder, config, family)


def _refuse_norms(folder: Path, config: Mapping[str, Any], family: Family) -> None:
    norms = {family.source(kind).norm for kind in KINDS}
    saved = config.get("modules_to_save") or ()
    # PEFT takes every module whose name ends so.
    if any(norm and norm.endswith(name.rpartition(".")[2]) for norm in norms for name in saved):
        raise ConfigurationError(
            f"adapter {folder} has modules_to_save={saved!r}: a norm behind what LoRA trains is "
            "trained too; merge it and give the full checkpoint"
        )


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


def _decompose(pairs: Sequence[Factors], stored: StoredWriter, top_k: int) -> LeftSingular:
    gain = stored.gain()
    if gain is not None:
        pairs = [replace(pair, b=gain[:, None] * pair.b) for pair in pairs]
    return left_singular(pairs[0], top_k) if len(pairs) == 1 else _side_by_side(pairs, top_k)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Factors are too small to share: threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def left_singular(factors: Factors, top_k: int) -> LeftSingular:
    """Left singular vectors of the difference that the factors make.

    As many as `top_k` or the numerical rank, whichever is smaller (see `numerical_floor`).
    Raises ConfigurationError for factors with NaN or infinity.
    """
    a, b = _finite(factors)
    basis, right = torch.linalg.qr(b)
    left = torch.linalg.qr(a.T, mode="r").R
    u, values, _ = torch.linalg.svd(factors.scaling * right @ left.T)
    return _leading(basis @ u, values, (b.shape[0], a.shape[1]), top_k)


def _side_by_side(experts: Sequence[Factors], top_k: int) -> LeftSingular:
    stack, columns = Stack(), 0
    for factors in experts:
        a, b = _finite(factors)
        left = torch.linalg.qr(a.T, mode="r").R
        stack.add(factors.scaling * b @ left.T)
        columns += a.shape[1]
    u, values = stack.svd()
    return _leading(u, values, (u.shape[0], columns), top_k)


def _finite(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors.a.double(), factors.b.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigurationError(f"adapter has NaN or Inf in {factors.module}; train it again")
    return a, b


def _leading(
    u: torch.Tensor, values: torch.Tensor, shape: tuple[int, int], top_k: int
) -> LeftSingular:
    floor = numerical_floor(float(values[0]), shape)
    kept = min(top_k, int((values > floor).sum()))
    energy = float(values.square().sum())
    return LeftSingular(fix_signs(u[:, :kept].T.numpy()), values[:kept].numpy(), energy)
