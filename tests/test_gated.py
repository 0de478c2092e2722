"""MLPs that overwrite their gates, beside transformers' own forward of the same module."""

import pytest
import torch
from tiny_families import TINY, config_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from transforms.model.gated import GATED, compute_in_place

CASES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "qwen2_moe",
)


def changed(case: str) -> list[nn.Module]:
    model = AutoModelForCausalLM.from_config(config_of(case)).eval()
    compute_in_place(model)
    return [module for module in model.modules() if "forward" in vars(module)]


def both(mlp: nn.Module, stream: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        return mlp(stream), type(mlp).forward(mlp, stream)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_and_the_input_stay_the_same(case: str, dtype: torch.dtype) -> None:
    found = changed(case)
    assert found
    for mlp in found:
        stream = torch.randn(3, 5, mlp.gate_proj.in_features, dtype=dtype)
        before = stream.clone()
        in_place, own = both(mlp.to(dtype), stream)
        torch.testing.assert_close(in_place, own, rtol=0, atol=0)
        torch.testing.assert_close(stream, before, rtol=0, atol=0)


def test_every_class_is_in_a_case_and_no_other_case_has_one() -> None:
    found = {case: {type(mlp) for mlp in changed(case)} for case in TINY}
    assert set().union(*found.values()) == set(GATED)
    assert {case for case, classes in found.items() if classes} - set(CASES) == {
        "gemma3, reads images"
    }
