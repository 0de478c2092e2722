"""One matrix as it stands in both models, read a few rows at a time."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transforms.model.gains import Gains, Rows
from transforms.model.rounding import NARROW, coarsest, holding

ROWS = 256
"""Rows read at a time: what is in memory of a matrix while it is compared with another."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A matrix before and after tuning, both of one shape."""

    base: Rows
    tuned: Rows
    shape: tuple[int, int]  # out, in
    gains: Gains | None = None  # of the norm that what it writes goes through, if there is one

    @staticmethod
    def of(base: Tensor, tuned: Tensor, gains: Gains | None = None) -> "Pair":
        """A pair that is in memory already."""
        before, after = (lambda *rows, of=each: of[slice(*rows)] for each in (base, tuned))
        return Pair(before, after, (base.shape[0], base.shape[1]), gains)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same few rows of both, from the first to the last."""
        for start in range(0, self.shape[0], ROWS):
            rows = start, min(start + ROWS, self.shape[0])
            yield self.base(*rows), self.tuned(*rows)

    def difference(self, start: int, end: int) -> Tensor:
        """Rows of tuned minus base, each times its gains, float64."""
        after, before = self.tuned(start, end).double(), self.base(start, end)
        if self.gains is None:
            return after.sub_(before)
        rows = slice(start, end), None
        return after.mul_(self.gains.tuned[rows]).sub_(before.double().mul_(self.gains.base[rows]))

    def digest(self) -> str:
        """SHA-256 of both matrices as stored, with their dtypes, shape and gains."""
        hashed = hashlib.sha256(repr(self.shape).encode())
        if self.gains is not None:
            errors = self.gains.errors
            gains = [*self.gains.both, *([] if errors is None else [errors])]
            hashed.update(repr([each.tolist() for each in gains]).encode())
        for piece in self.pieces():
            for part in piece:
                hashed.update(str(part.dtype).encode())
                hashed.update(part.contiguous().view(torch.uint8).numpy().data)
        return hashed.hexdigest()


@dataclass(frozen=True, slots=True)
class Survey:
    """What one reading of a pair tells."""

    base_precision: torch.dtype  # the coarsest dtype that holds every weight exactly
    tuned_precision: torch.dtype
    is_cast: bool  # the two are the same, but for the precision that one of them was saved in
    base_length: float  # Frobenius norms; not finite where a weight is not
    tuned_length: float
    length: float  # of the difference, gains left aside


def survey(pair: Pair) -> Survey:
    """Read both matrices once."""
    held: list[set[torch.dtype]] = [set(NARROW), set(NARROW)]
    equal = {*NARROW, torch.float64}
    squares = torch.zeros(3, dtype=torch.float64)
    stored = [torch.float64, torch.float64]
    for base, tuned in pair.pieces():
        stored = [base.dtype, tuned.dtype]
        held = [holding(base, held[0]), holding(tuned, held[1])]
        equal = {dtype for dtype in equal if torch.equal(base.to(dtype), tuned.to(dtype))}
        between = tuned.double().sub_(base)
        squares += torch.stack([_square(each) for each in (base, tuned, between)])
    before, after = (coarsest(*each) for each in zip(held, stored, strict=True))
    is_cast = before in equal or after in equal
    return Survey(before, after, is_cast, *squares.sqrt().tolist())


def _square(weights: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weights, dtype=torch.float64).square()
