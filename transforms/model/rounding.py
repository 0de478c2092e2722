"""How much of the difference of two stored matrices may be rounding.

A stored weight w stands for any number within half a unit in its last place, ulp(w); the error of
rounding is taken as uniform over that interval, variance ulp(w)^2 / 12 (Widrow & Kollar 2008,
Quantization Noise). The difference tuned minus base carries the error of the tuned weight, and a
second one wherever a weight was rounded twice: a base that is itself a copy in a lower precision,
or an adapter merged in the checkpoint's dtype. Both errors are taken in the coarser of the two
precisions, so the variance of an element of the difference is at most

    V = (ulp(base)^2 + ulp(tuned)^2) / 12

A random matrix of independent elements with these variances has a largest singular value of about

    edge = max over rows of sqrt(sum of V) + max over columns of sqrt(sum of V)

(Bandeira & van Handel 2016, arXiv 1408.6185, for rectangular matrices, less a term that is small
in dense ones; for one variance everywhere sigma * (sqrt(m) + sqrt(n)), exact in the limit, Bai &
Yin 1993).

How much of that is really there can be measured: rounding is spread over all singular values,
and its energy, the sum of their squares, is the sum of V. Singular values that are not above the
edge bound the energy of what is noise, and the edge goes with its square root; the bound is taken
again with the smaller edge until it stays. So a float32 merge onto a bfloat16 base, whose base was
never rounded, is not charged with bfloat16.

Matrices side by side are one wide matrix: their sums over rows add up. Where a norm multiplies what
a matrix writes, so it does the errors: V is multiplied by the square of the row's gain.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1.25
"""Singular values up to so many times the edge count as rounding.

At the edge itself the singular vector of a true direction is lost entirely; for noise of one
variance in a square matrix its cosine with the measured one is 0.87 at 1.25 times the edge
(Benaych-Georges & Nadakuditi 2012, arXiv 1103.2221). It also covers that the largest singular
value of noise exceeds the edge a little in small matrices.
"""
_NARROW = (torch.bfloat16, torch.float16, torch.float32)  # coarsest first
_ROWS = 256  # a block of rows at a time, so that no second float64 copy of the matrices is needed


def precision(weights: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every weight exactly.

    Not always the one they are stored in: weights rounded to bfloat16 may be saved as float32.
    """
    narrower = (dtype for dtype in _NARROW if torch.equal(weights.to(dtype).to(weights), weights))
    return next(narrower, weights.dtype)


def finest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one of these that keeps most digits."""
    return max(dtypes, key=(*_NARROW, torch.float64).index)


@dataclass(frozen=True, slots=True)
class Noise:
    """Variances of the rounding errors in a difference, summed."""

    rows: Tensor  # [out] float64, over each row
    column: float  # over a column, the largest

    def beside(self, other: "Noise") -> "Noise":
        """That of two differences side by side."""
        return Noise(self.rows + other.rows, max(self.column, other.column))


def noise(base: Tensor, tuned: Tensor, gains: tuple[Tensor, Tensor] | None = None) -> Noise:
    """Rounding errors of tuned minus base, as large as both precisions allow.

    Args:
      base: [out, in], in the dtype it is stored in (a floating type of torch).
      tuned: [out, in], likewise.
      gains: what the rows of base and tuned are multiplied by, [out] float64 each; None: 1.
    """
    dtypes = {precision(base), precision(tuned)}
    rows, columns = [], torch.zeros(base.shape[1], dtype=torch.float64)
    factors = gains or (torch.ones(base.shape[0]),) * 2
    blocks = (part.split(_ROWS) for part in (base, tuned, *factors))
    for before, after, *gain in zip(*blocks, strict=True):
        scaled = [
            _squared_ulp(weights, dtypes) * factor.square()[:, None]
            for weights, factor in zip((before, after), gain, strict=True)
        ]
        variance = (scaled[0] + scaled[1]) / 12
        rows.append(variance.sum(dim=1))
        columns += variance.sum(dim=0)
    return Noise(torch.cat(rows), float(columns.max()))


def rounding_floor(errors: Noise, values: Tensor) -> float:
    """The largest singular value of a difference that may be rounding.

    Args:
      errors: the difference's, see `noise`.
      values: all its singular values, float64, largest first.

    Returns:
      A bound in the unit of the singular values; 0 where the difference has no noise.
    """
    most = float(errors.rows.max().sqrt()) + math.sqrt(errors.column)
    energy = float(errors.rows.sum())
    if energy == 0:
        return 0.0
    edge = most
    while True:
        rest = float(torch.linalg.vector_norm(values[values <= MARGIN * edge]))
        measured = most * min(1.0, rest / math.sqrt(energy))
        if measured >= edge:
            return MARGIN * edge
        edge = measured


def half_ulps(weights: Tensor, dtypes: set[torch.dtype]) -> Tensor:
    """The largest error that rounding may have made in each weight, float64."""
    return _squared_ulp(weights, dtypes).sqrt() / 2


def _squared_ulp(weights: Tensor, dtypes: set[torch.dtype]) -> Tensor:
    """Square of the unit in the last place, float64, in the dtype where it is largest."""
    magnitudes = weights.double().abs()
    units = [_ulp(magnitudes, torch.finfo(dtype)) for dtype in dtypes]
    return torch.stack(units).amax(dim=0).square()


def _ulp(magnitudes: Tensor, dtype: torch.finfo) -> Tensor:
    # Below the smallest normal number the spacing no longer shrinks.
    exponents = torch.frexp(magnitudes.clamp_min(dtype.tiny)).exponent
    return dtype.eps * torch.exp2(exponents.double() - 1)
