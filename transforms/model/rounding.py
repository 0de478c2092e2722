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
from collections.abc import Callable, Collection, Iterable
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
NARROW = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that weights may have been rounded to, coarsest first."""


def precision(weights: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every weight exactly.

    Not always the one they are stored in: weights rounded to bfloat16 may be saved as float32.
    """
    return coarsest(holding(weights, NARROW), weights.dtype)


def holding(weights: Tensor, dtypes: Iterable[torch.dtype]) -> set[torch.dtype]:
    """Those of the dtypes that hold every weight exactly."""
    return {dtype for dtype in dtypes if torch.equal(weights.to(dtype).to(weights), weights)}


def coarsest(held: Collection[torch.dtype], stored: torch.dtype) -> torch.dtype:
    """The one of these narrow dtypes that keeps fewest digits, `stored` if there is none."""
    return next((dtype for dtype in NARROW if dtype in held), stored)


def finest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one of these that keeps most digits."""
    return max(dtypes, key=(*NARROW, torch.float64).index)


@dataclass(frozen=True, slots=True)
class Noise:
    """Variances of the rounding errors in a difference, summed."""

    rows: Tensor  # [out] float64, over each row
    column: float  # over a column, the largest

    def beside(self, other: "Noise") -> "Noise":
        """That of two differences side by side."""
        return Noise(self.rows + other.rows, max(self.column, other.column))


def noise(
    pieces: Iterable[tuple[Tensor, Tensor]],
    dtypes: Iterable[torch.dtype],
    gains: tuple[Tensor, Tensor] | None = None,
) -> Noise:
    """Rounding errors of tuned minus base, as large as both precisions allow.

    Args:
      pieces: rows of base and tuned, [rows, in] each, as stored, one after the other.
      dtypes: the precisions of the two.
      gains: what the rows of base and tuned are multiplied by, [out] float64 each; None: 1.
    """
    dtypes = set(dtypes)
    rows: list[Tensor] = []
    columns, done = torch.zeros((), dtype=torch.float64), 0
    for piece in pieces:
        variance = torch.zeros(())
        for side, weights in enumerate(piece):
            part = _squared_ulp(weights, dtypes) / 12
            if gains is not None:
                part = part * gains[side][done : done + len(part), None].square()
            variance = variance + part
        done += len(variance)
        rows.append(variance.sum(dim=1, dtype=torch.float64))
        columns = columns + variance.sum(dim=0, dtype=torch.float64)
    return Noise(torch.cat(rows), float(columns.max()))


def rounding_floor(errors: Noise, rest: Callable[[float], float]) -> float:
    """The largest singular value of a difference that may be rounding.

    Args:
      errors: the difference's, see `noise`.
      rest: takes a bound; returns the Frobenius norm of the part of the difference whose singular
        values do not exceed it.

    Returns:
      A bound in the unit of the singular values; 0 where the difference has no noise.
    """
    most = float(errors.rows.max().sqrt()) + math.sqrt(errors.column)
    energy = float(errors.rows.sum())
    edge = most
    while energy:
        measured = most * min(1.0, rest(MARGIN * edge) / math.sqrt(energy))
        if measured >= edge:
            return MARGIN * edge
        edge = measured
    return 0.0


def half_ulps(weights: Tensor, dtypes: set[torch.dtype]) -> Tensor:
    """The largest error that rounding may have made in each weight, float64."""
    return _squared_ulp(weights.double(), dtypes).sqrt() / 2


def _squared_ulp(weights: Tensor, dtypes: set[torch.dtype]) -> Tensor:
    """Square of the unit in the last place, in the dtype where it is largest."""
    powers = _powers_of_two(weights)
    # Below the smallest normal number the spacing no longer shrinks.
    units = [powers.clamp_min(info.tiny) * info.eps for info in map(torch.finfo, dtypes)]
    return torch.stack(units).amax(dim=0).square_()


def _powers_of_two(weights: Tensor) -> Tensor:
    """The largest powers of two that the magnitudes reach: their bits without sign and fraction."""
    if weights.dtype == torch.float64:
        return weights.view(torch.int64).bitwise_and(0x7FF << 52).view(torch.float64)
    return weights.float().view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
