"""The experts of a layer as one matrix.

A mixture of experts adds sum over e of p_e(x) W_e a_e(x) to the residual stream: W_e is the down
projection of expert e, a_e(x) what goes into it and p_e(x) the router's weight, 0 for most. That
is one wide matrix [W_1 ... W_E], applied to all p_e(x) a_e(x) below each other; an expert that
every token goes through is one more block. So a layer's MLP has the left singular vectors of the
blocks' differences side by side, as many as one of another family. The router belongs to the
input: it says how far a token moves along a direction, not where the directions are.
"""

import torch
from torch import Tensor


class Stack:
    """Matrices side by side, taken in one after the other: [out, in_1 + in_2 + ...].

    Only a factor [out, at most out] is kept. [A B] has the left singular vectors and the singular
    values of [L B] where A = L Q with orthonormal rows Q, so what was taken in is replaced by the
    L of its QR decomposition, which is backward stable (Golub & Van Loan 8.6.3).
    """

    def __init__(self) -> None:
        self.columns = 0
        self._factor: Tensor | None = None

    def add(self, matrix: Tensor) -> None:
        """Take in a float64 matrix [out, in]."""
        self.columns += matrix.shape[1]
        joined = matrix if self._factor is None else torch.cat([self._factor, matrix], dim=1)
        if joined.shape[1] > joined.shape[0]:
            joined = torch.linalg.qr(joined.T, mode="r").R.T
        self._factor = joined

    def svd(self) -> tuple[Tensor, Tensor]:
        """Left singular vectors [out, n] (columns) and all singular values [n], float64."""
        if self._factor is None:
            raise ValueError("nothing was taken in")
        u, values, _ = torch.linalg.svd(self._factor, full_matrices=False)
        return u, values


def split_fused(a: Tensor, b: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """LoRA factors of every expert, from those PEFT keeps for a fused parameter.

    Args:
      a: [experts * rank, in], experts one after the other.
      b: [out, rank * experts], all experts' first columns, then their second ones.
      experts: how many; must divide both.
    """
    rows = a.reshape(experts, -1, a.shape[1])
    columns = b.reshape(b.shape[0], -1, experts)
    return [(rows[expert], columns[:, :, expert]) for expert in range(experts)]
