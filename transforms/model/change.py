"""The change of what a layer writes with, and its left singular vectors, from stored matrices."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from transforms.model import svd
from transforms.model.experts import Stack
from transforms.model.gains import gain_floor
from transforms.model.pair import Pair, Survey, survey
from transforms.model.rounding import Noise, finest, noise, rounding_floor
from transforms.model.writers import LeftSingular, Rounding, fix_signs, numerical_floor


class Change:
    """Tuned minus base of all parts of one kind in one layer, taken in part by part."""

    def __init__(self) -> None:
        self._parts: list[Survey] = []
        self._changed: list[Pair] = []
        self._columns = 0  # of all parts side by side, those that did not change too
        self._noise: Noise | None = None
        self._gain_floor = 0.0

    def add(self, pair: Pair, seen: Survey | None = None) -> None:
        """Take in a part, finite, with its survey if it was made already."""
        seen = seen or survey(pair)
        self._parts.append(seen)
        self._columns += pair.shape[1]
        self._rows = pair.shape[0]
        tuned_gains = pair.gains is not None and pair.gains.errors is not None
        if not seen.is_cast:
            self._add_noise(pair, seen)
        elif tuned_gains:
            pair = replace(pair, base=pair.tuned)  # only the norm changed
        else:
            return
        if pair.gains is not None:
            self._gain_floor = math.hypot(self._gain_floor, gain_floor(pair.gains, pair.base))
        self._changed.append(pair)

    def _add_noise(self, pair: Pair, seen: Survey) -> None:
        gains = pair.gains.both if pair.gains else None
        errors = noise(pair.pieces(), (seen.base_precision, seen.tuned_precision), gains)
        self._noise = self._noise.beside(errors) if self._noise else errors

    def left_singular(self, top_k: int) -> LeftSingular:
        """The `top_k` largest, less those that cannot be told from rounding."""
        if not self._changed:
            nothing = np.empty((0, self._rows)), np.empty(0)
            return LeftSingular(*nothing, 0.0, self._rounding(floor=0.0, cut=0), 0.0)
        found = self._leading(top_k)
        cut = min(top_k, self._rows, sum(pair.shape[1] for pair in self._changed))
        return LeftSingular(
            fix_signs(found.vectors.numpy()),
            found.values.numpy(),
            found.energy,
            self._rounding(found.floor, cut - len(found.values)),
            self._share(),
            found.fallback,
        )

    def _leading(self, top_k: int) -> svd.Leading:
        numerical = numerical_floor(1.0, (self._rows, self._columns))
        if min(self._rows, self._columns) <= svd.LAPACK_ROWS:
            stack = Stack()
            for pair in self._changed:
                stack.add(pair.difference(0, self._rows))
            return svd.by_lapack(stack.factor, top_k, self._floor(numerical))
        return svd.by_grams(self._gram, top_k, self._floor(math.sqrt(numerical)))

    def _gram(self, dtype: torch.dtype) -> Tensor:
        gram = torch.zeros(self._rows, self._rows, dtype=torch.float64)
        for pair in self._changed:
            svd.gram_of(pair.difference, self._rows, dtype, onto=gram)
        return gram

    def _floor(self, numerical: float) -> svd.Floor:
        def floor(values: Tensor, energy: float) -> float:
            def rest(bound: float) -> float:
                unseen = max(0.0, energy - float(values.square().sum()))
                return math.sqrt(unseen + float(values[values <= bound].square().sum()))

            errors = rounding_floor(self._noise, rest) if self._noise else 0.0
            return max(errors + self._gain_floor, numerical * float(values[0]))

        return floor

    def _share(self) -> float:
        """Length of the difference over that of the base, gains left aside."""
        before = math.hypot(*(part.base_length for part in self._parts))
        return math.hypot(*(part.length for part in self._parts)) / before if before else math.inf

    def _rounding(self, floor: float, cut: int) -> Rounding:
        base = finest(part.base_precision for part in self._parts)
        tuned = finest(part.tuned_precision for part in self._parts)
        return Rounding(_name(base), _name(tuned), floor, cut)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
