"""A tiny random model of every family, and where it writes: said here from transformers' modules.

`transforms.model.families` names tensors on disk; this looks into the loaded model. Neither knows
of the other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

LAYERS, HIDDEN = 5, 24

_USUAL = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _USUAL | {"intermediate_size": 36, "num_key_value_heads": 2}
_GEMMA = _LLAMA | {"head_dim": 6, "sliding_window": 4}
_IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_IMAGE_TOKENS = {
    "mm_tokens_per_image": 4,
    "image_token_index": 39,
    "boi_token_index": 38,
    "eoi_token_index": 37,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model of a family, and where it writes."""

    config: dict[str, Any]
    attention: Callable[[Any], Any]  # layer -> module that writes
    mlp: Callable[[Any], list[Any]]  # layer -> modules that write, or fused parameters
    norms: tuple[str, ...] = ()  # behind attention and MLP
    one_plus: bool = False
    model_type: str = ""  # where it is not the name of the case
    targets: tuple[str, ...] = ("o_proj", "down_proj")  # of an adapter
    parameters: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)  # options of the adapter


def _o_proj(layer: Any) -> Any:
    return layer.self_attn.o_proj


def _down_proj(layer: Any) -> list[Any]:
    return [layer.mlp.down_proj]


def _experts(layer: Any) -> list[Any]:
    if not hasattr(layer.mlp, "experts"):
        return [layer.mlp.down_proj]
    shared = [layer.mlp.shared_expert.down_proj] if hasattr(layer.mlp, "shared_expert") else []
    return [layer.mlp.experts.down_proj, *shared]


_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_NEOX = {
    "attention": lambda layer: layer.attention.dense,
    "mlp": lambda layer: [layer.mlp.dense_4h_to_h],
    "targets": ("attention.dense", "dense_4h_to_h"),
}
_FALCON = {
    "attention": lambda layer: layer.self_attention.dense,
    "mlp": lambda layer: [layer.mlp.dense_4h_to_h],
    "targets": ("self_attention.dense", "dense_4h_to_h"),
}
_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

TINY: dict[str, Tiny] = {
    "llama": Tiny(_LLAMA, _o_proj, _down_proj),
    "mistral": Tiny(_LLAMA | {"sliding_window": 4}, _o_proj, _down_proj),
    "qwen2": Tiny(_LLAMA, _o_proj, _down_proj),
    "qwen3": Tiny(_LLAMA | {"head_dim": 6}, _o_proj, _down_proj),
    "phi3": Tiny(_LLAMA, _o_proj, _down_proj),
    "gemma2": Tiny(_GEMMA, _o_proj, _down_proj, _NORMS, one_plus=True),
    "gemma3_text": Tiny(_GEMMA, _o_proj, _down_proj, _NORMS, one_plus=True),
    "gemma3, reads images": Tiny(
        {"text_config": _GEMMA, "vision_config": _IMAGES, **_IMAGE_TOKENS},
        _o_proj,
        _down_proj,
        _NORMS,
        one_plus=True,
        model_type="gemma3",
    ),
    "olmo2": Tiny(_LLAMA, _o_proj, _down_proj, _NORMS),
    "gpt_neox": Tiny(_USUAL | {"intermediate_size": 36}, **_NEOX),
    "gpt_neox, sequential": Tiny(
        _USUAL | {"intermediate_size": 36, "use_parallel_residual": False},
        **_NEOX,
        model_type="gpt_neox",
    ),
    "gpt2": Tiny(
        _USUAL,
        lambda layer: layer.attn.c_proj,
        lambda layer: [layer.mlp.c_proj],
        targets=("c_proj",),
        more={"fan_in_fan_out": True},
    ),
    "falcon": Tiny(_USUAL | {"bias": True}, **_FALCON),
    "falcon, sequential": Tiny(
        _USUAL | {"parallel_attn": False, "alibi": True}, **_FALCON, model_type="falcon"
    ),
    "falcon, new": Tiny(
        _USUAL | {"new_decoder_architecture": True, "num_kv_heads": 2},
        **_FALCON,
        model_type="falcon",
    ),
    "mixtral": Tiny(
        _LLAMA | {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
        _o_proj,
        _experts,
        targets=("o_proj",),
        parameters=_FUSED,
    ),
    "qwen2_moe": Tiny(
        _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 14, "mlp_only_layers": [1]},
        _o_proj,
        _experts,
        targets=("o_proj", "shared_expert.down_proj", "layers.1.mlp.down_proj"),
        parameters=_FUSED[1:],
    ),
    "qwen3_moe": Tiny(
        _LLAMA | _EXPERTS | {"head_dim": 6},
        _o_proj,
        _experts,
        targets=("o_proj",),
        parameters=_FUSED,
    ),
}


def config_of(case: str) -> Any:
    """Its configuration, as transformers has it."""
    return CONFIG_MAPPING[TINY[case].model_type or case](**TINY[case].config)


def save_family(case: str, folder: Path, seed: int = 0) -> Path:
    """Save a random model, float32, in which no norm, bias or position is trivial."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(case))
    with torch.no_grad():
        for weight in model.parameters():
            weight += (0.3 if weight.ndim == 1 else 0.05) * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in float32, its experts one after the other: float64 has no faster way."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def fine_tune(base: Path, out: Path, size: float = 2e-3, seed: int = 3) -> Path:
    """Every weight moved at random, norms too: no difference has a low rank."""
    torch.manual_seed(seed)
    model = load(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn_like(weight)
    model.save_pretrained(out)
    return out


def train(case: str, base: Path, out: Path, **options: Any) -> Path:
    """Save an adapter whose factors are random, as if trained."""
    torch.manual_seed(7)
    tiny = TINY[case]
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 6, "init_lora_weights": False}
        | {"target_modules": list(tiny.targets), "target_parameters": list(tiny.parameters) or None}
        | tiny.more
        | options
    )
    get_peft_model(load(base), config).save_pretrained(out)
    return out


def layers_of(model: PreTrainedModel) -> Any:
    """The decoder layers."""
    trunk = getattr(model.base_model, "language_model", model.base_model)
    return trunk.h if hasattr(trunk, "h") else trunk.layers


def written_with(case: str, layer: Any) -> dict[str, np.ndarray]:
    """Float64 [out, in], by kind: what the layer writes with, but for positive numbers a token."""
    tiny = TINY[case]
    kinds = {"O": [tiny.attention(layer)], "D": tiny.mlp(layer)}
    matrices = {kind: np.hstack(list(_matrices(parts))) for kind, parts in kinds.items()}
    for kind, norm in zip(kinds, tiny.norms, strict=False):
        gain = _numpy(getattr(layer, norm).weight) + tiny.one_plus
        matrices[kind] = gain[:, None] * matrices[kind]
    return matrices


def _matrices(parts: Iterable[Any]) -> Iterable[np.ndarray]:
    for part in parts:
        if isinstance(part, torch.nn.Parameter):
            yield from _numpy(part)
        else:
            matrix = _numpy(part.weight)
            yield matrix.T if type(part).__name__ == "Conv1D" else matrix


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()
