"""One matrix as it stands in both models, read a few rows at a time."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transforms.model.rounding import NARROW

ROWS = 256
"""Rows read at a time: what is in memory of a matrix while it is compared with another."""

Rows = Callable[[int, int], Tensor]
"""Gives rows start to end of a matrix [out, in], as stored."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A matrix before and after tuning, both of one shape."""

    base: Rows
    tuned: Rows
    shape: tuple[int, int]  # out, in

    @staticmethod
    def of(base: Tensor, tuned: Tensor) -> "Pair":
        """A pair that is in memory already."""
        shape = (base.shape[0], base.shape[1])
        return Pair(lambda *rows: base[slice(*rows)], lambda *rows: tuned[slice(*rows)], shape)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same few rows of both, from the first to the last."""
        for start in range(0, self.shape[0], ROWS):
            rows = start, min(start + ROWS, self.shape[0])
            yield self.base(*rows), self.tuned(*rows)

    def difference(self, start: int, end: int) -> Tensor:
        """Rows of tuned minus base, float64."""
        return self.tuned(start, end).double().sub_(self.base(start, end))

    def digest(self) -> str:
        """SHA-256 of both matrices as stored, with their dtypes and shape."""
        hashed = hashlib.sha256(repr(self.shape).encode())
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
    length: float  # of the difference


def survey(pair: Pair) -> Survey:
    """Read both matrices once."""
    held: list[set[torch.dtype]] = [set(NARROW), set(NARROW)]
    equal = {*NARROW, torch.float64}
    squares = torch.zeros(3, dtype=torch.float64)
    stored = [torch.float64, torch.float64]
    for piece in pair.pieces():
        stored = [part.dtype for part in piece]
        held = [_holding(part, dtypes) for part, dtypes in zip(piece, held, strict=True)]
        equal = {dtype for dtype in equal if torch.equal(piece[0].to(dtype), piece[1].to(dtype))}
        squares += torch.stack([_square(piece[0]), _square(piece[1]), _distance(*piece)])
    before, after = (_coarsest(*each) for each in zip(held, stored, strict=True))
    is_cast = before in equal or after in equal
    return Survey(before, after, is_cast, *squares.sqrt().tolist())


def _holding(weights: Tensor, dtypes: set[torch.dtype]) -> set[torch.dtype]:
    """Those of the dtypes that hold every weight exactly."""
    return {dtype for dtype in dtypes if torch.equal(weights.to(dtype).to(weights), weights)}


def _coarsest(held: set[torch.dtype], stored: torch.dtype) -> torch.dtype:
    return next((dtype for dtype in NARROW if dtype in held), stored)


def _square(weights: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weights, dtype=torch.float64).square()


def _distance(base: Tensor, tuned: Tensor) -> Tensor:
    return _square(tuned.double().sub_(base))
