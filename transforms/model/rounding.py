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
"""

import math
from collections.abc import Callable, Iterable
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


@dataclass(frozen=True, slots=True)
class Noise:
    """Rounding errors as large as the precisions of both matrices allow."""

    edge: float  # about the largest singular value of such errors
    energy: float  # the sum of the squares of all their singular values


def rounding_noise(pieces: Iterable[tuple[Tensor, Tensor]], dtypes: Iterable[torch.dtype]) -> Noise:
    """What rounding may have added to the difference of two matrices.

    Args:
      pieces: rows of base and tuned, [rows, in] each, as stored, one after the other.
      dtypes: the precisions of the two.
    """
    dtypes = set(dtypes)
    rows: list[Tensor] = []
    columns: Tensor | float = 0.0
    for before, after in pieces:
        variance = (_squared_ulp(before, dtypes) + _squared_ulp(after, dtypes)) / 12
        rows.append(variance.sum(dim=1, dtype=torch.float64))
        columns = columns + variance.sum(dim=0, dtype=torch.float64)
    per_row, per_column = torch.cat(rows), torch.as_tensor(columns)
    edge = float(per_row.max().sqrt() + per_column.max().sqrt())
    return Noise(edge, float(per_row.sum()))


def rounding_floor(noise: Noise, rest: Callable[[float], float]) -> float:
    """The largest singular value of tuned minus base that may be rounding.

    Args:
      noise: see `rounding_noise`.
      rest: takes a bound; returns the Frobenius norm of the part of tuned minus base whose
        singular values do not exceed it.

    Returns:
      A bound in the unit of the singular values; 0 where the difference has no noise.
    """
    edge = noise.edge
    while noise.energy:
        measured = noise.edge * min(1.0, rest(MARGIN * edge) / math.sqrt(noise.energy))
        if measured >= edge:
            return MARGIN * edge
        edge = measured
    return 0.0


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
