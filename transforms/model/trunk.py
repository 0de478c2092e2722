"""Scores batches of conversations: the lowest and highest cosine of every direction.

The residual stream after layer l is compared with the directions of layer l (Zhong &
Raghunathan, arXiv 2508.00161, section 3). Each layer is reduced to two numbers per
conversation, role and direction inside a forward hook, so no hidden state outlives its layer
and nothing leaves the device before the end of the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.records import ABSENT, STEPS_PER_UNIT, Cosines, Int32s, Role
from transforms.model.directions import Directions
from transforms.model.loading import decoder_layers

_PADDING_ID = 0  # any id of the vocabulary: padded places are masked everywhere
_PADDING_ROLE = -1


class Scorer:
    """A trunk and the directions its residual stream is compared with.

    Threads may share one: batches go through the model one at a time.
    """

    def __init__(self, trunk: nn.Module, directions: Directions) -> None:
        """Put the directions, float32, on the trunk's device.

        Args:
          trunk: as made by `load_trunk`.
          directions: in stored order, that is with layers ascending.
        """
        self._trunk = trunk
        self._device = next(trunk.parameters()).device
        self._by_layer = _group_by_layer(directions, self._device)
        self._directions = len(directions)
        self._lock = Lock()

    def score(
        self, token_ids: Sequence[Int32s], roles: Sequence[NDArray[np.int8]]
    ) -> tuple[Cosines, NDArray[np.bool_]]:
        """Score one batch.

        Args:
          token_ids: per conversation, int32 [tokens].
          roles: per conversation, int8 [tokens], values of `Role`.

        Returns:
          Cosines of all conversations (roles without tokens, and all of a conversation whose
          activations are not finite: ABSENT), and bool [conversations]: all activations finite.
        """
        longest = max(map(len, token_ids), default=0)
        if longest == 0:
            return _nothing(len(token_ids), self._directions), np.ones(len(token_ids), np.bool_)
        ids = torch.from_numpy(_padded(token_ids, longest, _PADDING_ID, np.int64))
        places = torch.from_numpy(_padded(roles, longest, _PADDING_ROLE, np.int8))
        with self._lock, torch.inference_mode():
            reduction = _Reduction(places.to(self._device))
            with _hooked(self._trunk, self._by_layer, reduction):
                self._trunk(
                    input_ids=ids.to(self._device),
                    attention_mask=reduction.valid.long(),
                    use_cache=False,
                )
            return reduction.result()


class _Reduction:
    """Collects the extremes of one batch, layer by layer."""

    def __init__(self, roles: Tensor) -> None:
        """Take roles, int8 [batch, tokens], -1 where padded."""
        self.valid = roles != _PADDING_ROLE
        wanted = torch.tensor(list(Role), device=roles.device)
        self._of_role = roles[:, None, :] == wanted[:, None]  # [batch, role, tokens]
        self._finite = torch.ones(len(roles), dtype=torch.bool, device=roles.device)
        self._lows: list[tuple[Tensor, Tensor]] = []
        self._highs: list[tuple[Tensor, Tensor]] = []

    def add(self, hidden: Tensor, directions: Tensor) -> None:
        """Reduce hidden [batch, tokens, hidden] against directions [k, hidden]."""
        hidden = hidden.float()
        norms = torch.linalg.vector_norm(hidden, dim=-1)  # [batch, tokens]
        # The norm is NaN or Inf exactly where a component is, or where the length overflows.
        self._finite &= (torch.isfinite(norms) | ~self.valid).all(dim=1)
        norms = norms.clamp_min(torch.finfo(torch.float32).tiny)
        cosines = (hidden @ directions.T / norms[..., None]).transpose(1, 2)[:, None]
        of_role = self._of_role[:, :, None]  # [batch, role, 1, tokens]
        self._lows.append(_pair(torch.where(of_role, cosines, torch.inf).min(dim=-1)))
        self._highs.append(_pair(torch.where(of_role, cosines, -torch.inf).max(dim=-1)))

    def result(self) -> tuple[Cosines, NDArray[np.bool_]]:
        """Quantise, and bring everything to the host."""
        present = self._of_role.any(dim=-1) & self._finite[:, None]  # [batch, role]
        low, low_at = _collect(self._lows, present)
        high, high_at = _collect(self._highs, present)
        return Cosines(low, high, low_at, high_at), self._finite.cpu().numpy()


def _pair(extremes: Any) -> tuple[Tensor, Tensor]:
    return extremes.values, extremes.indices


def _collect(
    layers: Sequence[tuple[Tensor, Tensor]], present: Tensor
) -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
    """Join layers of [batch, role, k] to [batch, role * directions], absent roles marked."""
    values = torch.cat([value for value, _ in layers], dim=-1)
    places = torch.cat([place for _, place in layers], dim=-1)
    # nan_to_num: what does not exist is NaN or Inf, which has no defined integer.
    steps = (values.nan_to_num(0, 0, 0) * STEPS_PER_UNIT).round()
    steps = steps.clamp(-STEPS_PER_UNIT, STEPS_PER_UNIT)
    steps = torch.where(present[..., None], steps, ABSENT).to(torch.int16)
    places = torch.where(present[..., None], places, 0)
    return steps.flatten(1).cpu().numpy(), places.flatten(1).cpu().numpy().astype(np.uint32)


@contextmanager
def _hooked(trunk: nn.Module, by_layer: dict[int, Tensor], reduction: _Reduction) -> Iterator[None]:
    layers = decoder_layers(trunk)
    handles = [
        layers[number].register_forward_hook(_hook(reduction, directions))
        for number, directions in by_layer.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(reduction: _Reduction, directions: Tensor) -> Callable[..., None]:
    def reduce(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # Some families return a tuple whose first place is the residual stream.
        reduction.add(output[0] if isinstance(output, tuple) else output, directions)

    return reduce


def _group_by_layer(directions: Directions, device: torch.device) -> dict[int, Tensor]:
    """Rows of each layer, ascending, so that layers joined in order are in stored order."""
    vectors = torch.from_numpy(directions.vectors).to(device)
    numbers = [entry.layer for entry in directions.entries]
    if numbers != sorted(numbers):
        raise ValueError("directions are not in order of their layers")
    groups = groupby(range(len(numbers)), key=numbers.__getitem__)
    return {layer: vectors[list(rows)] for layer, rows in groups}


def _padded(
    rows: Sequence[NDArray[Any]], length: int, filler: int, dtype: type[np.integer[Any]]
) -> NDArray[Any]:
    """Stack rows to [rows, length], padded on the right."""
    padded = np.full((len(rows), length), filler, dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def _nothing(rows: int, directions: int) -> Cosines:
    shape = (rows, len(Role) * directions)
    absent, zero = np.full(shape, ABSENT, np.int16), np.zeros(shape, np.uint32)
    return Cosines(absent, absent.copy(), zero, zero.copy())
