"""Reduces the residual stream of one batch to its extremes, layer by layer.

Per conversation, role and direction what is kept is the lowest and the highest cosine, in steps,
and the first token that has it. Both are found in one pass over integers: a token's key is its
cosine in steps followed by its position, so the smallest key is the answer.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.records import ABSENT, STEPS_PER_UNIT, Cosines, Role

PADDING_ROLE = -1

PIECE = 1 << 14
"""Most tokens of a row looked at together: positions take the low 14 bits of a 32-bit key."""

_OUTSIDE = 1 << 30
"""Added to the keys of tokens that are not of a role; more than all keys are apart."""

_WORD = 1 << 32


class Reduction:
    """Collects the extremes of one batch, which may come in chunks of its tokens.

    Besides what it keeps, int64 [2, batch, role, k] a layer, it needs 12 bytes a token and
    direction of one layer, and the float32 of at most `PIECE` tokens a row where the stream has
    another type.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        """Begin a batch of `rows` conversations."""
        self._finite = torch.ones(rows, dtype=torch.bool, device=device)
        self._wanted = torch.tensor(list(Role), device=device)[:, None]
        self._found: dict[int, Tensor] = {}
        self._start = 0

    def begin(self, roles: Tensor, start: int) -> None:
        """The tokens of the next `add`s: roles int8 [batch, tokens], -1 where padded.

        `start` is the position of the first.
        """
        self._start = start
        self._padded = roles == PADDING_ROLE
        places = torch.arange(roles.shape[1], dtype=torch.int32, device=roles.device) % PIECE
        of_role = roles[:, None] == self._wanted  # [batch, role, tokens]
        self._places = torch.where(of_role, places, _OUTSIDE)

    def add(self, layer: int, hidden: Tensor, directions: Tensor) -> None:
        """Reduce hidden [batch, tokens, hidden] against directions, float32 [k, hidden]."""
        for start in range(0, hidden.shape[1], PIECE):
            piece = slice(start, start + PIECE)
            keys = self._keys(hidden[:, piece], directions, self._padded[:, piece])
            found = torch.stack([*self._ends(keys, self._places[..., piece])])
            self._merge(layer, found, self._start + start)

    def result(self) -> tuple[Cosines, NDArray[np.bool_]]:
        """Bring everything to the host: cosines, and bool [batch], whether all was finite.

        Layers come in the order in which they were first added.
        """
        low, high = torch.cat(list(self._found.values()), dim=-1)
        (low, low_at), (high, high_at) = self._unpacked(low), self._unpacked(high)
        high = np.where(high == ABSENT, high, -high)
        return Cosines(low, high, low_at, high_at), self._finite.cpu().numpy()

    def _keys(self, hidden: Tensor, directions: Tensor, padded: Tensor) -> Tensor:
        """Cosines in steps, times PIECE: int32 [batch, tokens, k]."""
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)  # [batch, tokens]
        # The norm is NaN or Inf exactly where a component is, or where the length overflows.
        self._finite &= (torch.isfinite(norms) | padded).all(dim=1)
        norms = norms.clamp_min(torch.finfo(torch.float32).tiny)
        steps = hidden.float() @ directions.T
        steps = steps.div_(norms[..., None]).mul_(STEPS_PER_UNIT).round_()
        # nan_to_num: NaN has no defined integer.
        steps = steps.nan_to_num_(0).clamp_(-STEPS_PER_UNIT, STEPS_PER_UNIT)
        return steps.to(torch.int32).mul_(PIECE)

    def _ends(self, keys: Tensor, places: Tensor) -> Iterator[Tensor]:
        """Smallest key of the cosines, then of their negatives: int32 [batch, role, k] each."""
        by_role = [places[:, role, :, None] for role in Role]
        yield torch.stack([(place + keys).amin(dim=1) for place in by_role], dim=1)
        yield torch.stack([(place - keys).amin(dim=1) for place in by_role], dim=1)

    def _merge(self, layer: int, found: Tensor, start: int) -> None:
        """Keep the smaller of what was found before and now, as steps * 2^32 + position."""
        steps, places = found >> (PIECE.bit_length() - 1), found & (PIECE - 1)
        keys = steps.long() * _WORD + places + start
        before = self._found.get(layer)
        self._found[layer] = keys if before is None else torch.minimum(before, keys)

    def _unpacked(self, keys: Tensor) -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
        """Steps and positions, [batch, role * directions], absent roles marked."""
        steps, places = keys >> 32, keys & (_WORD - 1)
        # What is outside of its role has more steps than there are.
        present = (steps <= STEPS_PER_UNIT) & self._finite[:, None, None]
        steps = torch.where(present, steps, ABSENT).to(torch.int16)
        places = torch.where(present, places, 0)
        return steps.flatten(1).cpu().numpy(), places.flatten(1).cpu().numpy().astype(np.uint32)
