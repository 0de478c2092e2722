"""The change of what a layer writes with, and its left singular vectors, from stored matrices."""

import math

import numpy as np
import torch
from torch import Tensor

from transforms.model.experts import Stack
from transforms.model.gains import Gains, gain_floor, is_cast
from transforms.model.rounding import Noise, finest, noise, precision, rounding_floor
from transforms.model.writers import LeftSingular, Rounding, fix_signs, numerical_floor


class Change:
    """Tuned minus base of all parts of one kind in one layer, taken in part by part."""

    def __init__(self, gains: Gains | None = None) -> None:
        """Take the gains of the norm that all parts together go through, if there is one."""
        self._gains = gains
        self._stack = Stack()
        self._shape = (0, 0)  # of all parts side by side, those that did not change too
        self._noise: Noise | None = None
        self._gain_floor = 0.0
        self._base_precision: set[torch.dtype] = set()
        self._tuned_precision: set[torch.dtype] = set()

    def add(self, base: Tensor, tuned: Tensor) -> None:
        """Take in a part, both [out, in] as stored and finite."""
        self._shape = (base.shape[0], self._shape[1] + base.shape[1])
        self._base_precision.add(precision(base))
        self._tuned_precision.add(precision(tuned))
        if not is_cast(base, tuned):
            errors = noise(base, tuned, self._gains.both if self._gains else None)
            self._noise = self._noise.beside(errors) if self._noise else errors
        elif self._gains is None or self._gains.errors is None:
            return
        else:
            base = tuned  # only the norm changed
        if self._gains is not None:
            self._gain_floor = math.hypot(self._gain_floor, gain_floor(self._gains, base))
        self._stack.add(_difference(base, tuned, self._gains))

    def left_singular(self, top_k: int) -> LeftSingular:
        """The `top_k` largest, less those that cannot be told from rounding."""
        if self._stack.columns == 0:
            nothing = np.empty((0, self._shape[0])), np.empty(0)
            return LeftSingular(*nothing, self._rounding(floor=0.0, cut=0))
        u, values = self._stack.svd()
        errors = rounding_floor(self._noise, values) if self._noise else 0.0
        smallest = numerical_floor(float(values[0]), self._shape)
        floor = max(errors + self._gain_floor, smallest)
        wanted = min(top_k, len(values))
        kept = min(wanted, int((values > floor).sum()))
        rounding = self._rounding(floor, cut=wanted - kept)
        return LeftSingular(fix_signs(u[:, :kept].T.numpy()), values[:kept].numpy(), rounding)

    def _rounding(self, floor: float, cut: int) -> Rounding:
        kept = finest(self._base_precision), finest(self._tuned_precision)
        base, tuned = (str(dtype).removeprefix("torch.") for dtype in kept)
        return Rounding(base, tuned, floor, cut)


def _difference(base: Tensor, tuned: Tensor, gains: Gains | None) -> Tensor:
    if gains is None:
        return tuned.double().sub_(base)
    before, after = (gain[:, None] for gain in gains.both)
    return tuned.double().mul_(after).sub_(base.double().mul_(before))
