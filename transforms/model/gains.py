"""What a norm between a matrix and the residual stream does to the matrix's directions.

Gemma 2 and 3 and OLMo 2 add RMSNorm(W x) to the residual stream, not W x. An RMSNorm divides by a
number of the token, its root mean square, and multiplies component i by a gain g_i, so

    written = (1 / rms(W x)) * diag(g) W x

But for that positive number per token the layer writes with the matrix diag(g) W. Its difference,
diag(g') W' - diag(g) W for a tuned W' and g', takes the place of W' - W; where the norm was not
tuned that is diag(g) (W' - W), and a direction u of W' - W alone would reach the residual stream
as g * u. The number per token changes too; this stretches what the base writes already and adds
no direction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from transforms.model.rounding import half_ulps, precision


@dataclass(frozen=True, slots=True)
class Gains:
    """The gains of a norm before and after the tuning."""

    base: Tensor  # [out] float64
    tuned: Tensor  # [out] float64
    errors: Tensor | None  # [out] float64, the largest that rounding may have made in their
    # difference; None where the norm was not tuned

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Base and tuned."""
        return self.base, self.tuned


def gains_of(base: Tensor, tuned: Tensor, one_plus: bool) -> Gains:
    """Gains from a norm's weights [out], as stored.

    Where one is only the other in a lower precision, the norm was not tuned, and the tuned model's
    serves for both: rounding a gain is a change of every direction of its row, but no training.
    """
    after = tuned.double() + one_plus
    if is_cast(base, tuned):
        return Gains(after, after, None)
    dtypes = {precision(base), precision(tuned)}
    errors = half_ulps(base, dtypes) + half_ulps(tuned, dtypes)
    return Gains(base.double() + one_plus, after, errors)


def is_cast(base: Tensor, tuned: Tensor) -> bool:
    """Whether the two are the same, but for the precision that one of them was saved in."""
    kept = (precision(base), precision(tuned))
    return any(torch.equal(base.to(dtype), tuned.to(dtype)) for dtype in kept)


def gain_floor(gains: Gains, matrix: Tensor) -> float:
    """The largest singular value that rounding of tuned gains alone can make.

    The errors e of the gains add diag(e) W. With |e| <= a in every component that is
    diag(e / a) diag(a) W, and its norm not above that of diag(a) W. 0 where the norm was not tuned.
    """
    if gains.errors is None:
        return 0.0
    written = matrix.double() * gains.errors[:, None]
    return float(torch.linalg.eigvalsh(written @ written.T)[-1].clamp_min(0).sqrt())
