"""Scores batches of conversations: the lowest and highest cosine of every direction.

The residual stream after layer l is compared with the directions of layer l (Zhong &
Raghunathan, arXiv 2508.00161, section 3). Each layer is reduced to two numbers per
segment and direction inside a forward hook, so no hidden state outlives its layer
and nothing leaves the device before the end of the batch. A batch longer than a chunk goes through
the trunk chunk by chunk, with a cache of keys and values; then memory grows with a conversation
by its cache only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from schemas.records import Int32s, Segments
from transforms.model.chunks import can_be_cut, chunks
from transforms.model.directions import Directions
from transforms.model.loading import decoder_layers
from transforms.model.reduction import Reduction
from transforms.model.segments import cut

CHUNK_TOKENS = 4096
"""The most that go through the model at once unless `--batch-tokens` says otherwise.

Chunks may be longer than batches are: every chunk looks back at all tokens before it.
"""

_PADDING_ID = 0  # any id of the vocabulary: nothing before it sees what it becomes


class Scorer:
    """A trunk and the directions its residual stream is compared with.

    Threads may share one: batches go through the model one at a time.
    """

    def __init__(
        self, trunk: nn.Module, directions: Directions, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        """Put the directions, float32, on the trunk's device.

        Args:
          trunk: as made by `load_trunk`.
          directions: in stored order, that is with layers ascending.
          chunk_tokens: most tokens, padding included, that go through the trunk at once.
        """
        self._trunk = trunk
        self._chunk_tokens = chunk_tokens if can_be_cut(trunk.config) else None
        self._device = next(trunk.parameters()).device
        self._by_layer = _group_by_layer(directions, self._device)
        self._directions = len(directions)
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the trunk's weights and of the directions."""
        held = (self._trunk.parameters(), self._trunk.buffers(), self._by_layer.values())
        return sum(tensor.nbytes for tensor in chain(*held))

    def score(
        self, token_ids: Sequence[Int32s], roles: Sequence[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Score one batch.

        Args:
          token_ids: per conversation, int32 [tokens].
          roles: per conversation, int8 [tokens], values of `Role`.

        Returns:
          Segments of all conversations (none of one whose activations are not finite), and bool
          [conversations]: all activations finite.
        """
        longest = max(map(len, token_ids), default=0)
        if longest == 0:
            return Segments.none(len(token_ids), self._directions), np.ones(
                len(token_ids), np.bool_
            )
        ids = torch.from_numpy(_padded(token_ids, longest))
        lengths = torch.tensor([len(each) for each in token_ids])
        padded = torch.arange(longest) >= lengths[:, None]
        with self._lock, torch.inference_mode():
            reduction = Reduction(cut(roles), len(ids), self._device)
            with _hooked(self._trunk, self._by_layer, reduction):
                self._forward(ids.to(self._device), padded.to(self._device), reduction)
            return reduction.result()

    def _forward(self, ids: Tensor, padded: Tensor, reduction: Reduction) -> None:
        """Send ids [batch, tokens] through the trunk, as a whole or chunk by chunk.

        Without a mask: attention looks back only, and padding stands behind everything.
        """
        parts = chunks(ids.shape[1], self._chunk_tokens and self._chunk_tokens // len(ids))
        config: Any = self._trunk.config
        cache = DynamicCache(config=config) if len(parts) > 1 else None
        for part in parts:
            reduction.begin(padded[:, part], part.start)
            self._trunk(input_ids=ids[:, part], past_key_values=cache, use_cache=cache is not None)


@contextmanager
def _hooked(trunk: nn.Module, by_layer: dict[int, Tensor], reduction: Reduction) -> Iterator[None]:
    layers = decoder_layers(trunk)
    handles = [
        layers[number].register_forward_hook(_hook(reduction, number, directions))
        for number, directions in by_layer.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(reduction: Reduction, layer: int, directions: Tensor) -> Callable[..., None]:
    def reduce(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # Some families return a tuple whose first place is the residual stream.
        reduction.add(layer, output[0] if isinstance(output, tuple) else output, directions)

    return reduce


def _group_by_layer(directions: Directions, device: torch.device) -> dict[int, Tensor]:
    """Rows of each layer, ascending, so that layers joined in order are in stored order."""
    vectors = torch.from_numpy(directions.vectors).to(device)
    numbers = [entry.layer for entry in directions.entries]
    if numbers != sorted(numbers):
        raise ValueError("directions are not in order of their layers")
    groups = groupby(range(len(numbers)), key=numbers.__getitem__)
    return {layer: vectors[list(rows)] for layer, rows in groups}


def _padded(rows: Sequence[Int32s], length: int) -> NDArray[np.int64]:
    """Stack rows to [rows, length], padded on the right."""
    padded = np.full((len(rows), length), _PADDING_ID, np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
