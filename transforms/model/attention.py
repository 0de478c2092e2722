"""Causal attention in blocks of queries, for float32 on a CPU.

Every block of BLOCK queries is compared with the keys up to its last one, by products of matrices
over all heads that share their keys. torch's own kernel compares larger blocks, and so makes up to
a quarter more comparisons that no query may make; and it does not know queries that begin behind
the first key, as those of a chunk do, without a mask over all pairs.
"""

from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK: Final = 64
"""Queries compared at once; more would waste comparisons, fewer make small matrices."""

_NAME: Final = "causal_blocks"
_TORCH_S: Final = "sdpa"


def attend_in_blocks(trunk: Any) -> None:
    """Have a model attend in blocks, where it is float32 on a CPU and would use torch's kernel."""
    weights = next(trunk.parameters())
    is_plain = weights.device.type == "cpu" and weights.dtype == torch.float32
    can_choose = trunk._supports_attention_backend  # Falcon cannot
    if is_plain and can_choose and trunk.config._attn_implementation == _TORCH_S:
        trunk.set_attn_implementation(_NAME)


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of queries to all keys up to their own, the last ones being the queries' own.

    Args:
      query: float32 [batch, heads, tokens, size].
      key: float32 [batch, groups, seen, size], seen >= tokens; heads are a multiple of groups, and
        those of a group follow one another.
      value: float32 [batch, groups, seen, width].
      scaling: factor of the products before the softmax.

    Returns:
      float32 [batch, tokens, heads, width].
    """
    batch, heads, tokens, size = query.shape
    groups, seen = key.shape[1:3]
    found = query.new_empty(batch, tokens, heads, value.shape[-1])
    of_groups = found.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    queries = query.unflatten(1, (groups, -1))
    keys, values = (each.reshape(batch * groups, seen, -1) for each in (key, value))
    room = query.new_empty(batch * heads * min(BLOCK, tokens) * seen)
    for start in range(0, tokens, BLOCK):
        block = queries[:, :, :, start : start + BLOCK]
        last = seen - tokens + start + block.shape[3]
        rows = block.reshape(batch * groups, -1, size)
        weights = _weights(rows, keys[:, :last], block.shape[3], scaling, room)
        shape = (*block.shape[:-1], value.shape[-1])
        of_groups[:, :, :, start : start + BLOCK] = (weights @ values[:, :last]).view(shape)
    return found


def _weights(rows: Tensor, keys: Tensor, block: int, scaling: float, room: Tensor) -> Tensor:
    """Softmax of the products of rows [n, heads * block, size] and keys [n, last, size]."""
    shape = (*rows.shape[:2], keys.shape[1])
    scores = room[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.baddbmm(scores, rows, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    later = torch.full((block, block), float("-inf")).triu_(1)
    scores.unflatten(1, (-1, block))[..., -block:].add_(later)
    return torch.softmax(scores, dim=-1, out=scores)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal and attention_mask is None and key.shape[2] > BLOCK:
        return attention(query, key, value, scaling or query.shape[-1] ** -0.5), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _mask(**asked: Any) -> Tensor | None:
    """None where `attention` attends to what the mask would leave; else torch's."""
    near, keys = asked.get("local_size"), asked["kv_length"]
    is_all = asked.get("attention_mask") is None and (near is None or keys < near)
    if asked["allow_is_causal_skip"] and is_all and keys > BLOCK:
        return None
    mask: Tensor | None = sdpa_mask(**asked)
    return mask


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, _mask)
