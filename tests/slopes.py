"""Whether something that is measured again and again grows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_S = 60
NOISE = 3.0
"""Standard errors within which a slope counts as none."""

NEGLIGIBLE = 0.01
"""Of its mean, what something may have grown by over all that was measured."""


@dataclass(frozen=True)
class Slope:
    """Of a line through the lowest values of blocks."""

    mean: float
    per_hour: float
    error: float  # standard error of per_hour
    hours: float  # that were measured

    @property
    def flat(self) -> bool:
        """Whether it is none, as far as can be told."""
        within_noise = abs(self.per_hour) <= NOISE * self.error
        return within_noise or self.per_hour * self.hours <= NEGLIGIBLE * self.mean


def slope(at: NDArray[np.float64], values: NDArray[np.float64]) -> Slope:
    """Least squares over the lowest values of blocks.

    What is taken and given back within a block is no growth, and the error would be too small if
    neighbouring samples, which share their noise, were taken for independent ones.

    Args:
      at: seconds, ascending.
      values: as many.
    """
    blocks = (at // BLOCK_S).astype(int)
    hours = np.array([at[blocks == block].mean() for block in np.unique(blocks)]) / 3600
    lowest = np.array([np.min(values[blocks == block]) for block in np.unique(blocks)])
    centred = hours - hours.mean()
    per_hour = (centred @ lowest) / (centred @ centred)
    residuals = lowest - lowest.mean() - per_hour * centred
    error = np.sqrt(residuals @ residuals / (len(hours) - 2) / (centred @ centred))
    return Slope(float(lowest.mean()), float(per_hour), float(error), float(np.ptp(hours)))
