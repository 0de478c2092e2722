"""How a long conversation is cut to go through a model piece by piece."""

from math import isqrt
from typing import Any

FLOOR = 128
"""Chunks of fewer tokens would cost more than the memory they save."""

_BY_LENGTH = ("dynamic", "longrope")


def chunks(tokens: int, width: int | None) -> list[slice]:
    """Cut 0..tokens to chunks of at most `width`; None: one chunk.

    Attention of a chunk compares its tokens with all before them. Later chunks are shorter, so
    that no chunk makes more comparisons than `width` tokens make with themselves.
    """
    if width is None:
        return [slice(0, tokens)]
    found, start = [], 0
    while start < tokens:
        end = min(start + _size(start, max(width, 1)), tokens)
        found.append(slice(start, end))
        start = end
    return found


def can_be_cut(config: Any) -> bool:
    """Whether the pieces, with the keys and values of those before, give what the whole gives.

    Not so where a rotary embedding depends on the length of what the model sees at once: the
    first chunk would be turned by other angles than the whole.

    Args:
      config: of a transformers model.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else rope.values()  # one, or one per type of layer
    return not any(kind["rope_type"] in _BY_LENGTH for kind in kinds)


def _size(start: int, width: int) -> int:
    """The largest size with size * (start + size) <= width^2, but at least FLOOR or width."""
    size = (isqrt(start * start + 4 * width * width) - start) // 2
    return max(size, min(width, FLOOR))
