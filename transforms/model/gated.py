"""Gated MLPs that compute in the memory they already have.

transformers computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))` and takes new memory for every
step, each several times as wide as the residual stream. On a CPU the way to memory is what these
steps cost. Here activation and product overwrite the gate's output: the same operations on the same
values, so the same bits. Only without gradients, which need what is overwritten.
"""

from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

GATED: Final = (
    Gemma2MLP,
    Gemma3MLP,
    LlamaMLP,
    MistralMLP,
    Olmo2MLP,
    Qwen2MLP,
    Qwen2MoeMLP,
    Qwen3MLP,
)
"""Those whose `forward` is the line above and nothing else; others stay as they are."""


def compute_in_place(trunk: nn.Module) -> None:
    """Have the gated MLPs of a model overwrite their gates."""
    for module in trunk.modules():
        if type(module) in GATED:
            module.forward = partial(_forward, module)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    """x [..., hidden] to [..., hidden]."""
    gate = mlp.gate_proj(x)
    is_silu = isinstance(mlp.act_fn, SiLUActivation)
    opened = silu(gate, inplace=True) if is_silu else mlp.act_fn(gate)
    projected: Tensor = mlp.down_proj(opened.mul_(mlp.up_proj(x)))
    return projected
