"""What writes into the residual stream, and what is taken from its difference.

Two in every decoder layer, attention's `o_proj` and the MLP's `down_proj` (see `families`). Where
a difference comes from (an adapter's factors, two checkpoints) is the business of the modules that
make a `Writer`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rounding:
    """How much of one matrix's difference may be rounding of the stored weights."""

    base_precision: str  # coarsest dtype that holds the base's matrix exactly, e.g. "bfloat16"
    tuned_precision: str
    floor: float  # singular values up to here may be rounding; 0: the matrices are the same
    cut: int  # how many of the `top_k` largest singular values are not above the floor


@dataclass(frozen=True, slots=True)
class LeftSingular:
    """The leading left singular vectors of one matrix's difference, tuned minus base."""

    vectors: NDArray[np.float64]  # [k, out], unit rows, signs as by `fix_signs`
    values: NDArray[np.float64]  # [k], largest first
    rounding: Rounding | None = None  # None where nothing was rounded: an adapter's factors


@dataclass(frozen=True, slots=True)
class Writer:
    """What one kind writes with in one layer, whose difference can be decomposed."""

    layer: int
    kind: str  # "o_proj" or "down_proj"
    decompose: Callable[[int], LeftSingular]
    """Takes `top_k`; does all the work. Raises ConfigurationError for weights that are no use."""


def numerical_floor(largest: float, shape: tuple[int, int]) -> float:
    """Up to where float64 singular values are errors of the decomposition itself.

    s0 * max(in, out) * eps, the rule of LAPACK users (Golub & Van Loan 5.4.1).
    """
    return largest * max(shape) * float(np.finfo(np.float64).eps)


def fix_signs(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn each row so that its component of largest magnitude is positive."""
    largest = np.abs(vectors).argmax(axis=1, keepdims=True)
    signs: NDArray[np.float64] = np.sign(np.take_along_axis(vectors, largest, axis=1))
    return vectors * signs
