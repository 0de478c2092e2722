"""Attention in blocks, beside a softmax in float64 and beside transformers' own of whole models."""

from typing import Any

import pytest
import torch
from tiny_families import TINY, config_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from transforms.model import attention as module
from transforms.model.attention import BLOCK, attend_in_blocks, attention

FALCONS = {case for case in TINY if case.startswith("falcon")}
"""Have attention of their own."""

ELSEWHERE = {"gemma2", "gemma3_text", "gemma3, reads images", "mistral"}
"""The first has no kernel for its capped scores; windows of 4 tokens take a mask everywhere."""


def exact(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """In float64, head by head and query by query."""
    batch, heads, tokens, _ = query.shape
    shared, seen = heads // key.shape[1], key.shape[2]
    found = torch.empty(batch, tokens, heads, value.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            keys, values = (each[row, head // shared].double() for each in (key, value))
            for token in range(tokens):
                last = seen - tokens + token + 1
                scores = keys[:last] @ query[row, head, token].double() * scaling
                found[row, token, head] = scores.softmax(0) @ values[:last]
    return found


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("before", [0, 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_against_float64(tokens: int, before: int, groups: int) -> None:
    torch.manual_seed(tokens + before)
    query = torch.randn(2, tokens, 6, 8).transpose(1, 2)
    key = torch.randn(2, before + tokens, groups, 8).transpose(1, 2)
    value = torch.randn(2, before + tokens, groups, 5).transpose(1, 2)
    kept = [each.clone() for each in (query, key, value)]
    found = attention(query, key, value, 0.7)
    torch.testing.assert_close(found.double(), exact(query, key, value, 0.7), atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, kept, (query, key, value)))


def model_of(case: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.base_model


def states(trunk: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    """The last state of every token, where the tokens come in parts that end at these."""
    cache = DynamicCache(config=trunk.config.get_text_config()) if len(cuts) > 1 else None
    parts = zip([0, *cuts], cuts, strict=False)
    with torch.inference_mode():
        found = [
            trunk(
                input_ids=ids[:, start:end], past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state
            for start, end in parts
        ]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("case", [case for case in TINY if case not in FALCONS])
@pytest.mark.parametrize("cuts", [[60], [20, 60], [3, 11, 60]])
def test_whole_models(case: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    used, plain = [], attention
    monkeypatch.setattr(module, "attention", lambda *rest: used.append(1) or plain(*rest))
    trunk = model_of(case)
    ids = torch.randint(3, 40, (2, 60))
    own = states(trunk, ids, [60])
    attend_in_blocks(trunk)
    torch.testing.assert_close(states(trunk, ids, cuts), own, atol=1e-4, rtol=1e-4)
    assert bool(used) == (case not in ELSEWHERE)


def test_a_window_takes_a_mask_once_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    seen, plain = [], attention
    monkeypatch.setattr(
        module, "attention", lambda q, k, *rest: seen.append(k.shape[2]) or plain(q, k, *rest)
    )
    trunk = model_of("mistral")
    trunk.config.sliding_window = 40
    for layer in trunk.layers:
        layer.self_attn.sliding_window = 40
    ids = torch.randint(3, 40, (2, 60))
    own = states(trunk, ids, [60])
    attend_in_blocks(trunk)
    torch.testing.assert_close(states(trunk, ids, [30, 39, 60]), own, atol=1e-4, rtol=1e-4)
    assert set(seen) == {30, 39}


@pytest.mark.parametrize("case", sorted(FALCONS))
def test_a_family_that_cannot_choose_is_left_alone(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    trunk = model_of(case)
    before = trunk.config._attn_implementation
    attend_in_blocks(trunk)
    assert trunk.config._attn_implementation == before
    assert not caplog.records


def test_other_types_than_float32_are_left_to_torch() -> None:
    trunk = model_of("llama").to(torch.bfloat16)
    attend_in_blocks(trunk)
    assert trunk.config._attn_implementation == "sdpa"


def test_what_is_not_causal_is_left_to_torch() -> None:
    query, key, value = (torch.randn(1, 2, BLOCK + 5, 4) for _ in range(3))
    found, _ = module._forward(nn.Module(), query, key, value, None, is_causal=False)
    own = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, own.transpose(1, 2))
