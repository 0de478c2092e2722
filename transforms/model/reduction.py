"""Reduces the residual stream of one batch to the extremes of its segments, layer by layer.

Per segment and direction what is kept is the lowest and the highest cosine, in steps, and the first
token that has it. Both are found in one pass over integers: a token's key is its cosine in steps
followed by its place in the segment, so the smallest key is the answer.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.records import SEGMENT_TOKENS, STEPS_PER_UNIT, Segments
from transforms.model.segments import Cut

PIECE = 1 << 14
"""Most tokens of a row that are float32 at a time where the stream has another type."""

TOGETHER = 1 << 12
"""Most segments whose tokens are laid side by side at a time."""

_PLACE_BITS = SEGMENT_TOKENS.bit_length() - 1
_NOTHING = 1 << 30
"""Larger than every key."""


class Reduction:
    """Collects the extremes of one batch, which may come in chunks of its tokens.

    Besides what it keeps, int32 [2, S, k] a layer, it needs 6 bytes a token and direction of one
    layer, and 12 bytes a direction for every place in `TOGETHER` segments.
    """

    def __init__(self, cut: Cut, rows: int, device: torch.device) -> None:
        """Begin a batch of `rows` conversations, cut to segments."""
        self._cut = cut
        self._finite = torch.ones(rows, dtype=torch.bool, device=device)
        self._device = device
        self._found: dict[int, Tensor] = {}

    def begin(self, padded: Tensor, start: int) -> None:
        """The tokens of the next `add`s: bool [batch, tokens], true where there is none.

        `start` is the position of the first.
        """
        self._padded = padded
        width = padded.shape[1]
        cut, end = self._cut, start + width
        chosen = np.flatnonzero((cut.start < end) & (cut.end > start))
        first = np.maximum(cut.start[chosen], start)[:, None]
        last = np.minimum(cut.end[chosen], end)[:, None] - 1
        # A segment with fewer tokens has its last one several times, which changes no extreme.
        positions = np.minimum(first + np.arange(SEGMENT_TOKENS), last)
        self._index = self._tensor(cut.row[chosen][:, None] * width + positions - start)
        self._places = self._tensor(positions - cut.start[chosen][:, None]).to(torch.int32)
        self._chosen = self._tensor(chosen)

    def add(self, layer: int, hidden: Tensor, directions: Tensor) -> None:
        """Reduce hidden [batch, tokens, hidden] against directions, float32 [k, hidden]."""
        pieces = [
            self._steps(hidden[:, start : start + PIECE], directions, start)
            for start in range(0, hidden.shape[1], PIECE)
        ]
        steps = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        steps = steps.flatten(0, 1)
        found = self._found.get(layer)
        if found is None:
            shape = (2, len(self._cut), len(directions))
            found = torch.full(shape, _NOTHING, dtype=torch.int32, device=self._device)
            self._found[layer] = found
        for part, keys in self._smallest(steps):
            found[:, part] = torch.minimum(found[:, part], keys)

    def result(self) -> tuple[Segments, NDArray[np.bool_]]:
        """Bring everything to the host: segments, and bool [batch], whether all was finite.

        Layers come in the order in which they were first added. What was not finite has no
        segments.
        """
        finite = self._finite.cpu().numpy()
        kept = np.flatnonzero(finite[self._cut.row])
        keys = torch.cat(list(self._found.values()), dim=-1)[:, self._tensor(kept)]
        steps = (keys >> _PLACE_BITS).to(torch.int16).cpu().numpy()
        places = (keys & (SEGMENT_TOKENS - 1)).to(torch.uint8).cpu().numpy()
        cut = self._cut
        segments = Segments(
            len(finite),
            cut.row[kept].astype(np.int32),
            cut.role[kept],
            cut.start[kept].astype(np.uint32),
            (cut.end - cut.start)[kept].astype(np.uint8),
            steps[0],
            -steps[1],
            places[0],
            places[1],
        )
        return segments, finite

    def _steps(self, hidden: Tensor, directions: Tensor, start: int) -> Tensor:
        """Cosines in steps: int16 [batch, tokens, k]; the first token stands at `start`."""
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)  # [batch, tokens]
        # The norm is NaN or Inf exactly where a component is, or where the length overflows.
        padded = self._padded[:, start : start + hidden.shape[1]]
        self._finite &= (torch.isfinite(norms) | padded).all(dim=1)
        norms = norms.clamp_min(torch.finfo(torch.float32).tiny)
        steps = hidden.float() @ directions.T
        steps = steps.div_(norms[..., None]).mul_(STEPS_PER_UNIT).round_()
        # nan_to_num: NaN has no defined integer.
        return steps.nan_to_num_(0).clamp_(-STEPS_PER_UNIT, STEPS_PER_UNIT).to(torch.int16)

    def _smallest(self, steps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Segments, and the smallest key of the cosines and of their negatives: [2, segments, k].

        `steps` are of all tokens, [batch * tokens, k].
        """
        for start in range(0, len(self._chosen), TOGETHER):
            part = slice(start, start + TOGETHER)
            laid = steps[self._index[part]].to(torch.int32) << _PLACE_BITS  # [segments, place, k]
            places = self._places[part, :, None]
            lowest = (laid + places).amin(dim=1)
            yield self._chosen[part], torch.stack([lowest, (places - laid).amin(dim=1)])

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)
