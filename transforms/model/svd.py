"""The leading left singular vectors of one matrix: by LAPACK, or by a method that proves itself.

Small matrices are decomposed by LAPACK. For large ones the left vectors are those of the Gram
matrix G = A A^T, out x out. Only its leading eigenvectors are computed, by a block Krylov method
from a random start (Musco & Musco 2015, arXiv 1504.05477): an orthonormal basis of X, XG, XG^2, ...
and the eigenpairs of G within it. Float64 resolves singular values down to sqrt(in * eps) ~ 2e-6 of
the largest, far below the rounding of half precision weights, and G fits into memory where a
decomposition of A does not. Its products are in float32, which takes half the time, as long as no
singular value below 4% of the largest matters.

A random start proves nothing, so the result is checked in two ways that know nothing of how it was
found. With U the k vectors, t_1 >= ... >= t_k their squared singular values, T = diag(t), P the
projector on U:

- *They are singular vectors.* The residuals r_i = |G u_i - t_i u_i| <= TOLERANCE * sqrt(t_i t_k).
- *None is missing.* mu I - (G - U^T T U) has a Cholesky factor, so it is positive definite, and so
  |(I - P) G (I - P)| < mu: the level under which vectors are cut anyway, or t_k * (1 + SLACK).

Both together bound what is lost. In the basis of U and its complement G is diag(T, H) with |H| < mu
and an off-diagonal part whose rows are as long as the r_i. For every h > 0 that part is at most
diag(h T, sum of r_i^2 / (h t_i)), so the squared singular value i of A is at most the larger of
t_i * (1 + h) and mu + k * TOLERANCE^2 * t_k / h. With h = TOLERANCE * sqrt(k) the energy along
every vector is at least 1 - SLACK - TOLERANCE * sqrt(k) of the exact, 0.9991 for 20 vectors. And a
vector whose singular value is 1% from all others, their squares 2%, is within the angle
TOLERANCE / 0.02 of the exact one (Davis & Kahan 1970): its cosine is above 0.9999.

Where a check fails after the largest basis, all eigenvectors of G are computed by LAPACK. Why a
Cholesky factor and no random probe of the norm: a probe would need hundreds of products to tell
norms that differ by SLACK (Kuczynski & Wozniakowski 1992), the factor takes a few per cent of the
time that G takes, and cannot be unlucky.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LAPACK_ROWS = 1024
"""Matrices with at most so many rows or columns are decomposed by LAPACK: a second or less."""

ALGORITHM = 1
"""Raise it with any change of what comes out: results cached on disk are then not used again."""

TOLERANCE = 1e-4
SLACK = 4e-4

_SINGLE = 2e-3
"""Squares of singular values down to so much of the largest are known well enough from products in
float32: their errors are below 1e-8 of the largest square, a twentieth of TOLERANCE."""

_WIDTH = 1024  # products summed in their own dtype
_SPARE = 4  # vectors in a block more than asked for
_BLOCKS = 60  # the largest basis has so many blocks
_GROWTH = 1.3  # the basis grows by so much between two looks at it: a look costs its cube
_EPS = float(torch.finfo(torch.float64).eps)
_ROUNDING = 16 * _EPS  # of a residual, in units of the largest square

Floor = Callable[[Tensor, float], float]
"""Takes the leading singular values (largest first, all that exceed what it returns or more than
are wanted) and the sum of squares of all; returns the value up to which they are cut."""


@dataclass(frozen=True, slots=True)
class Leading:
    """The leading left singular vectors of a matrix [out, in]."""

    vectors: Tensor  # [k, out] float64, orthonormal rows
    values: Tensor  # [k] float64, largest first, all above the floor
    floor: float
    energy: float  # sum of the squares of all singular values
    fallback: bool = False  # whether LAPACK had to do what could not be verified


def by_lapack(matrix: Tensor, top_k: int, floor: Floor) -> Leading:
    """Decompose a float64 matrix [out, in] by LAPACK, backward stable.

    A wide matrix is R^T Q^T with its transpose's QR, and has the left vectors and values of the
    small square R^T; Q is never formed (Golub & Van Loan 8.6.3).
    """
    if matrix.shape[1] > matrix.shape[0]:
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    energy = float(values.square().sum())
    return _leading(u.T, values, top_k, floor(values, energy), energy)


def by_grams(make: Callable[[torch.dtype], Tensor], top_k: int, floor: Floor) -> Leading:
    """Decompose a large matrix by its Gram matrix, in no more precision than it takes.

    Args:
      make: makes the Gram matrix [out, out], float64, with products in the dtype it is given (see
        `gram_of`).
      top_k: how many vectors are wanted at most.
      floor: see `Floor`.
    """
    found = _proven(make(torch.float32), top_k, floor, _BLOCKS)
    if found is not None and _level(found, top_k) >= _SINGLE * float(found.values[:1].sum()) ** 2:
        return found
    return by_gram(make(torch.float64), top_k, floor)


def by_gram(gram: Tensor, top_k: int, floor: Floor, blocks: int = _BLOCKS) -> Leading:
    """Decompose a matrix whose product with its own transpose is given.

    Args:
      gram: [out, out] float64, symmetric; changed, and of no use afterwards.
      top_k: how many vectors are wanted at most.
      floor: see `Floor`.
      blocks: bound of the basis, in blocks of a few vectors more than `top_k`.
    """
    energy = float(gram.trace())
    found = _proven(gram, top_k, floor, blocks)
    if found is not None:
        return found
    squares, vectors = torch.linalg.eigh(gram)
    values = _roots(squares.flip(0))
    return _leading(vectors.T.flip(0), values, top_k, floor(values, energy), energy, True)


def _proven(gram: Tensor, top_k: int, floor: Floor, blocks: int) -> Leading | None:
    energy = float(gram.trace())
    if energy == 0:
        return Leading(gram[:0], gram[:0, 0], 0.0, 0.0)
    basis = _Basis(gram, top_k + _SPARE, blocks)
    for _ in basis.looks():
        found = basis.leading(top_k, floor, energy)
        if found and _are_singular(gram, found) and _none_missing(gram, found, top_k):
            return found
    return None


def gram_of(
    rows: Callable[[int, int], Tensor],
    count: int,
    dtype: torch.dtype,
    height: int = 512,
    onto: Tensor | None = None,
) -> Tensor:
    """The Gram matrix [count, count], float64, of a matrix that is never whole in memory.

    Args:
      rows: gives rows start to end, [end - start, in] float64, any number of times.
      count: of rows.
      dtype: of the products; a thousand at a time are summed in it, the sums in float64.
      height: rows taken at a time; two such pieces are in memory.
      onto: that of matrices beside this one; it is added there.
    """
    gram = torch.zeros(count, count, dtype=torch.float64) if onto is None else onto
    edges = [(start, min(start + height, count)) for start in range(0, count, height)]
    for index, (top, bottom) in enumerate(edges):
        here = rows(top, bottom).to(dtype)
        gram[top:bottom, top:bottom] += _product(here, here)
        for left, right in edges[:index]:
            product = _product(here, rows(left, right).to(dtype))
            gram[top:bottom, left:right] += product
            gram[left:right, top:bottom] += product.T
    return gram


def _product(one: Tensor, other: Tensor) -> Tensor:
    """One times the other's transpose, float64."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for left, right in zip(one.split(_WIDTH, dim=1), other.split(_WIDTH, dim=1), strict=True):
        total += left @ right.T
    return total


class _Basis:
    """A Krylov basis that grows, and the projection of G on it."""

    def __init__(self, gram: Tensor, width: int, blocks: int) -> None:
        self._gram, self._width = gram, width
        limit = min(blocks, len(gram) // width) * width
        self._all = gram.new_empty(limit, len(gram))
        self._projected = gram.new_empty(limit, limit)
        self._size = 0
        seeded = torch.Generator().manual_seed(0)  # the same artefact whenever it is made
        start = torch.randn(width, len(gram), generator=seeded, dtype=gram.dtype)
        self._next = _orthonormal(start @ gram, self._rows)
        self._rest = self._next

    @property
    def _rows(self) -> Tensor:
        return self._all[: self._size]

    def looks(self) -> Iterator[None]:
        """Let the basis grow; stop whenever it is worth a look, and at the end."""
        look = 3.0 * self._width
        while self._size < len(self._all):
            self._grow()
            if self._size >= look or self._size == len(self._all):
                look = self._size * _GROWTH
                yield

    def _grow(self) -> None:
        start, self._size = self._size, self._size + self._width
        self._all[start : self._size] = self._next
        image = self._next @ self._gram
        inside = image @ self._rows.T
        self._projected[start : self._size, : self._size] = inside
        self._projected[: self._size, start : self._size] = inside.T
        # A second projection, because the first leaves rounding errors.
        self._rest = _outside(image - inside @ self._rows, self._rows)
        self._next = _orthonormal(self._rest, self._rows)

    def leading(self, top_k: int, floor: Floor, energy: float) -> Leading | None:
        """What the basis has to say, if it has come so far that a check may succeed."""
        squares, inner = torch.linalg.eigh(self._projected[: self._size, : self._size])
        values, inner = _roots(squares.flip(0)), inner.flip(1)
        bound = floor(values, energy)
        kept = min(top_k, int((values > bound).sum()))
        # Only the last block's image reaches out of the basis.
        residuals = (inner[-self._width :, : kept + 1].T @ self._rest).norm(dim=1)
        if not _small(residuals[:kept], values[:kept]):
            return None
        if kept < top_k and values[kept] ** 2 + residuals[kept] > bound**2:
            return None  # the next one may yet rise above the floor
        return _leading(inner[:, :kept].T @ self._rows, values, top_k, bound, energy)


def _leading(
    vectors: Tensor,
    values: Tensor,
    top_k: int,
    floor: float,
    energy: float,
    fallback: bool = False,
) -> Leading:
    kept = min(top_k, int((values > floor).sum()))
    return Leading(vectors[:kept], values[:kept], floor, energy, fallback)


def _roots(squares: Tensor) -> Tensor:
    return squares.clamp_min(0).sqrt()


def _outside(block: Tensor, basis: Tensor) -> Tensor:
    """The block less its projection on the basis."""
    return block - (block @ basis.T) @ basis


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows that span those of the block, and are orthogonal to the basis.

    Rows of the block that depend on each other to the last bit become random ones instead.
    """
    for _ in range(2):
        block = _outside(_scaled(block), basis)
    return _scaled(block)


def _scaled(block: Tensor) -> Tensor:
    """Rows nearly orthonormal: to half of the digits, or all if they nearly were before.

    By the eigenvectors of the block's Gram matrix (Stathopoulos & Wu 2002): two products, where
    Householder's QR goes column by column.
    """
    squares, turn = torch.linalg.eigh(block @ block.T)
    return (turn * squares.clamp_min(float(squares[-1]) * _EPS).rsqrt()).T @ block


def _small(residuals: Tensor, values: Tensor) -> bool:
    if len(values) == 0:
        return True
    allowed = TOLERANCE * values * values[-1]
    return bool((residuals <= allowed.clamp_min(_ROUNDING * float(values[0]) ** 2)).all())


def _are_singular(gram: Tensor, found: Leading) -> bool:
    images = found.vectors @ gram
    return _small((images - found.values[:, None] ** 2 * found.vectors).norm(dim=1), found.values)


def _level(found: Leading, top_k: int) -> float:
    """The square that no singular value beside those found may exceed."""
    level = found.floor**2
    if len(found.values) == top_k:
        level = max(level, float(found.values[-1]) ** 2 * (1 + SLACK))
    return level


def _none_missing(gram: Tensor, found: Leading, top_k: int) -> bool:
    """Whether no singular value beside those found exceeds what is allowed.

    Works in `gram`, which is afterwards the same but for rounding.
    """
    level = _level(found, top_k)
    weighted = (found.vectors * found.values[:, None] ** 2).T
    gram.neg_().addmm_(weighted, found.vectors).diagonal().add_(level)
    positive = int(torch.linalg.cholesky_ex(gram).info) == 0
    gram.neg_().addmm_(weighted, found.vectors).diagonal().add_(level)
    return positive
