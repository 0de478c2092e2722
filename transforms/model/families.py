"""Model families: where their decoder layers write into the residual stream.

A family is a row of `FAMILIES`; everything that differs between architectures is in it. To add
one, read its `modeling_*.py` in transformers, add a row here and a tiny configuration to
`tests/tiny_families.py`; `docs/architectures.md` says what to look for.

Every decoder layer writes twice: attention's output projection, called `o_proj` here in every
family, and the MLP's second projection, called `down_proj`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

KINDS = ("o_proj", "down_proj")
"""What writes, whatever a family calls it; in stored order."""

ONLY, SHARED, FUSED = "", "shared", "fused"
"""Parts of what one kind writes with, besides experts apart ("0", "1", ...)."""


@dataclass(frozen=True)
class Projection:
    """A linear module whose output is added to the residual stream."""

    module: str  # within the decoder layer
    norm: str | None = None  # RMSNorm of the layer between it and the residual stream

    @property
    def parts(self) -> Mapping[str, str]:
        """Which part a module of the layer is, by its path as an expression."""
        return {re.escape(self.module): ONLY}

    @property
    def paths(self) -> tuple[str, ...]:
        """All modules it names."""
        return (self.module,) if self.norm is None else (self.module, self.norm)

    def __str__(self) -> str:
        return self.module


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a sum of projections, weighted per token. Paths within the layer."""

    apart: str  # one matrix an expert, "*" for its number: as published
    fused: str  # all in one [expert, out, in]: as transformers holds them
    shared: str | None = None  # an expert that every token goes through
    dense: str | None = None  # layers without experts have this instead
    norm: ClassVar[None] = None  # no known family has one behind the sum

    @property
    def parts(self) -> Mapping[str, str]:
        """Which part a module of the layer is, by its path as an expression."""
        named = {self.shared: SHARED, self.dense: ONLY, self.fused: FUSED}
        one = re.escape(self.apart).replace(r"\*", r"(?P<expert>\d+)")
        return {one: ""} | {re.escape(path): part for path, part in named.items() if path}

    @property
    def paths(self) -> tuple[str, ...]:
        """All modules it names."""
        return tuple(filter(None, (self.apart, self.fused, self.shared, self.dense)))

    def __str__(self) -> str:
        return self.apart

    @property
    def container(self) -> str:
        """The module that holds the fused parameter."""
        return self.fused.rpartition(".")[0]


@dataclass(frozen=True)
class Place:
    """Where a matrix that writes stands."""

    layer: int
    kind: str  # of KINDS
    part: str  # ONLY, an expert's number, SHARED or FUSED


@dataclass(frozen=True)
class Family:
    """One architecture, as transformers builds it."""

    attention: Projection
    mlp: Projection | Experts
    layers: str = "layers"  # the list of decoder layers, within the trunk
    final_norm: str = "norm"  # after the last layer, within the trunk
    embedding: str = "embed_tokens"  # of tokens, within the trunk
    conv1d: bool = False  # matrices are stored [in, out]
    one_plus: bool = False  # a norm multiplies by 1 + its weight
    parallel: str = "no"  # whether MLP and attention read the same input; for the reader only
    config_names: Mapping[str, str] = field(default_factory=dict)
    """Entries of config.json that other families call differently: own name -> usual name."""

    def place(self, module: str) -> Place | None:
        """Where the module (or fused parameter) of this name writes; None for every other one.

        Whatever stands before the list of layers does not matter: models saved without their
        head and parts of multi-modal models have other prefixes.
        """
        layer, path = self.split(module)
        found = None if layer is None else self.part(path)
        return None if layer is None or found is None else Place(layer, *found)

    def split(self, module: str) -> tuple[int | None, str]:
        """Number of the decoder layer a module is in, and its path there."""
        match = re.fullmatch(rf"(?:.+\.)?{re.escape(self.layers)}\.(\d+)\.(.+)", module)
        return (None, module) if match is None else (int(match[1]), match[2])

    def part(self, path: str) -> tuple[str, str] | None:
        """Kind and part of the module of a layer with this path, if it writes."""
        for expression, (kind, part) in self._parts.items():
            match = re.fullmatch(expression, path)
            if match is not None:
                return kind, match.groupdict().get("expert", part)
        return None

    def source(self, kind: str) -> "Projection | Experts":
        """What a kind writes with."""
        return self.attention if kind == KINDS[0] else self.mlp

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all modules on the way to what writes, and of norms behind it."""
        paths = [path for kind in KINDS for path in self.source(kind).paths]
        return frozenset(name for path in paths for name in path.split(".") if name != "*")

    @cached_property
    def _parts(self) -> Mapping[str, tuple[str, str]]:
        return {
            path: (kind, part) for kind in KINDS for path, part in self.source(kind).parts.items()
        }


_LLAMA = Family(Projection("self_attn.o_proj"), Projection("mlp.down_proj"))
_GEMMA = Family(
    Projection("self_attn.o_proj", norm="post_attention_layernorm"),
    Projection("mlp.down_proj", norm="post_feedforward_layernorm"),
    one_plus=True,
)
_QWEN3_EXPERTS = Experts(
    apart="mlp.experts.*.down_proj", fused="mlp.experts.down_proj", dense="mlp.down_proj"
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Family(
        Projection("self_attn.o_proj", norm="post_attention_layernorm"),
        Projection("mlp.down_proj", norm="post_feedforward_layernorm"),
    ),
    "gpt_neox": Family(
        Projection("attention.dense"),
        Projection("mlp.dense_4h_to_h"),
        final_norm="final_layer_norm",
        embedding="embed_in",
        parallel="if use_parallel_residual",
    ),
    "gpt2": Family(
        Projection("attn.c_proj"),
        Projection("mlp.c_proj"),
        layers="h",
        final_norm="ln_f",
        embedding="wte",
        conv1d=True,
        config_names={
            "n_layer": "num_hidden_layers",
            "n_embd": "hidden_size",
            "n_inner": "intermediate_size",
        },
    ),
    "falcon": Family(
        Projection("self_attention.dense"),
        Projection("mlp.dense_4h_to_h"),
        layers="h",
        final_norm="ln_f",
        embedding="word_embeddings",
        parallel="if parallel_attn or new_decoder_architecture",
        config_names={"ffn_hidden_size": "intermediate_size"},
    ),
    "mixtral": Family(
        Projection("self_attn.o_proj"),
        Experts(apart="block_sparse_moe.experts.*.w2", fused="mlp.experts.down_proj"),
    ),
    "qwen2_moe": Family(
        Projection("self_attn.o_proj"),
        replace(_QWEN3_EXPERTS, shared="mlp.shared_expert.down_proj"),
    ),
    "qwen3_moe": Family(Projection("self_attn.o_proj"), _QWEN3_EXPERTS),
}
"""By `model_type` of config.json."""


def table() -> str:
    """All families as a Markdown table, for docs/architectures.md."""
    titles = (
        "`model_type`",
        "layers",
        "attention writes",
        "MLP writes",
        "stored",
        "norm between",
        "parallel",
    )
    rows = [titles, ("---",) * len(titles)]
    rows += [_row(name, family) for name, family in sorted(FAMILIES.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(name: str, family: Family) -> tuple[str, ...]:
    norms = [family.source(kind).norm for kind in KINDS]
    gain = "1 + weight" if family.one_plus else "weight"
    return (
        f"`{name}`",
        f"`{family.layers}`",
        f"`{family.attention.module}`",
        _mlp(family.mlp),
        "[in, out]" if family.conv1d else "[out, in]",
        ", ".join(f"`{norm}`" for norm in norms if norm) + f" ({gain})" if any(norms) else "no",
        family.parallel,
    )


def _mlp(mlp: Projection | Experts) -> str:
    if isinstance(mlp, Projection):
        return f"`{mlp.module}`"
    shared = f", and `{mlp.shared}`" if mlp.shared else ""
    dense = f"; in layers without experts `{mlp.dense}`" if mlp.dense else ""
    return f"experts: `{mlp.apart}` or fused `{mlp.fused}`{shared}{dense}"
