"""The leading singular vectors of one matrix against NumPy's SVD, and whether the proof is one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.model import svd

TOP_K = 8
SHAPE = 160, 220
few = settings(max_examples=15)


def no_cut(values: torch.Tensor, energy: float) -> float:
    return float(values[0]) * 1e-6


def matrix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """With these singular values, and singular vectors at random."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in SHAPE)
    return left * values @ right.T


def gram(of: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(of @ of.T)


def assert_as_good_as_lapack(found: svd.Leading, exact: np.ndarray, top_k: int = TOP_K) -> None:
    """The criteria that directions of large matrices must meet."""
    u, s, _ = np.linalg.svd(exact)
    count = len(found.values)
    assert count == min(top_k, int(np.sum(s > found.floor)))
    vectors = found.vectors.numpy()
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(count), atol=1e-10)
    energies = np.linalg.norm(vectors @ exact, axis=1) ** 2 / s[:count] ** 2
    assert (energies > 0.999).all()
    np.testing.assert_allclose(found.values, s[:count], rtol=5e-4)
    between = np.append(np.inf, -np.diff(s)[: count + 1]) / s[: count + 2]
    apart = np.minimum(between[:count], -np.diff(s)[:count] / s[:count]) >= 0.01
    cosines = np.abs((vectors * u[:, :count].T).sum(axis=1))
    assert (cosines[apart] > 0.9999).all()
    np.testing.assert_allclose(found.energy, np.sum(s**2), rtol=1e-7)


RANKS = np.arange(1, 161)
SPECTRA = {
    "power law": RANKS**-0.5,
    "steep power law": RANKS**-3.0,
    "falling to nothing": 0.93**RANKS,
    "all the same": np.ones(160),
    "nearly the same": 1 - RANKS / 2000,
    "steps": np.repeat(np.linspace(1, 0.5, 32), 5),
    "a few": np.array([1.0, 0.999, 0.7, 0.1, 0.003]),
    "one": np.array([3.0]),
    "a few, far apart": np.concatenate([[1, 1e-2, 1e-4], np.full(157, 1e-7)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_against_numpy(name: str) -> None:
    exact = matrix(SPECTRA[name])
    found = svd.by_gram(gram(exact), TOP_K, no_cut)
    assert_as_good_as_lapack(found, exact)
    assert not found.fallback


@few
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.floats(0.001, 2), st.floats(0, 3))
def test_low_rank_in_noise_against_numpy(seed: int, rank: int, noise: float, fall: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.arange(1, rank + 1.0) ** -fall
    exact = matrix(values, seed) + noise * rng.normal(size=SHAPE) / np.sqrt(SHAPE).sum()
    assert_as_good_as_lapack(svd.by_gram(gram(exact), TOP_K, no_cut), exact)


@few
@given(st.integers(0, 2**32 - 1), st.floats(1.02, 3))
def test_what_a_floor_cuts_is_not_waited_for(seed: int, clear: float) -> None:
    """Five values above the floor, the lowest of them anywhere; noise below it."""
    rng = np.random.default_rng(seed)
    exact = matrix(np.append(np.linspace(9, 4, 4), clear), seed)
    exact += 0.5 * rng.normal(size=SHAPE) / np.sqrt(SHAPE).sum()
    found = svd.by_gram(gram(exact), TOP_K, lambda values, energy: 1.0)
    assert_as_good_as_lapack(found, exact)


def test_lapack_itself_where_the_basis_is_too_small() -> None:
    exact = matrix(SPECTRA["nearly the same"])
    found = svd.by_gram(gram(exact), TOP_K, no_cut, blocks=3)
    assert found.fallback
    u, s, _ = np.linalg.svd(exact)
    np.testing.assert_allclose(found.values, s[:TOP_K], rtol=1e-10)
    assert np.abs((found.vectors.numpy() * u[:, :TOP_K].T).sum(axis=1)).min() > 0.999999


def test_more_vectors_than_a_basis_can_hold() -> None:
    exact = matrix(RANKS**-0.5)
    found = svd.by_gram(gram(exact), 200, no_cut)
    assert found.fallback
    assert found.vectors.shape == (160, 160)


def of_numpy(exact: np.ndarray, rows: list[int]) -> svd.Leading:
    u, s, _ = np.linalg.svd(exact)
    vectors, values = torch.from_numpy(u.T[rows]), torch.from_numpy(s[rows])
    return svd.Leading(vectors, values, 0.0, float(np.sum(s**2)))


@pytest.mark.parametrize("missed", [0, 3, 7])
def test_a_missing_vector_is_noticed(missed: int) -> None:
    exact = matrix(RANKS**-0.1)  # the 8th and the 9th value differ by 1.2%
    whole, product = of_numpy(exact, list(range(TOP_K))), gram(exact)
    assert svd._none_missing(product, whole, TOP_K)
    lacking = of_numpy(exact, [row for row in range(TOP_K + 1) if row != missed])
    assert svd._are_singular(product, lacking), "each of them is a singular vector"
    assert not svd._none_missing(product, lacking, TOP_K)
    np.testing.assert_allclose(product, gram(exact), atol=1e-13)


def test_a_missing_vector_above_the_floor_is_noticed() -> None:
    exact = matrix(np.array([5, 4, 3, 2, 1.0]))
    product = gram(exact)
    for floor, complete in ((1.9, False), (2.1, True)):
        found = replace(of_numpy(exact, [0, 1, 2]), floor=floor)
        assert svd._none_missing(product, found, TOP_K) == complete


def test_vectors_that_are_turned_a_little_are_noticed() -> None:
    exact = matrix(RANKS**-0.1)
    found = of_numpy(exact, list(range(TOP_K)))
    assert svd._are_singular(gram(exact), found)
    turned = found.vectors.clone()
    turned[3] = np.cos(0.01) * found.vectors[3] + np.sin(0.01) * found.vectors[4]
    assert not svd._are_singular(gram(exact), replace(found, vectors=turned))


@pytest.mark.parametrize("height", [1, 7, 160, 1000])
def test_the_gram_matrix_in_pieces(height: int) -> None:
    exact = torch.from_numpy(matrix(RANKS**-0.5))
    pieces = svd.gram_of(lambda start, end: exact[start:end], 160, torch.float64, height)
    torch.testing.assert_close(pieces, exact @ exact.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sign", [1, -1], ids=["one sign", "both signs"])
def test_products_in_float32_are_as_exact_as_is_said(sign: int) -> None:
    """Sums of one sign lose most; the first of them is nearly of rank one."""
    exact = torch.rand(256, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact[:, ::2] *= sign
    single = svd.gram_of(lambda start, end: exact[start:end], 256, torch.float32)
    largest = torch.linalg.matrix_norm(exact @ exact.T, 2)
    assert torch.linalg.matrix_norm(single - exact @ exact.T, 2) < 1e-8 * largest


def test_float64_where_float32_is_too_coarse() -> None:
    exact = matrix(np.append(np.geomspace(1, 1e-2, 6), 1e-6))
    asked: list[torch.dtype] = []

    def make(dtype: torch.dtype) -> torch.Tensor:
        asked.append(dtype)
        return svd.gram_of(lambda *rows: torch.from_numpy(exact[slice(*rows)]), 160, dtype)

    assert_as_good_as_lapack(svd.by_grams(make, 6, no_cut), exact, 6)
    assert asked == [torch.float32, torch.float64]
    assert_as_good_as_lapack(svd.by_grams(make, 4, no_cut), exact, 4)
    assert asked[2:] == [torch.float32]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_lapack_of_small_ones(shape: tuple[int, int]) -> None:
    exact = np.random.default_rng(0).normal(size=shape)
    found = svd.by_lapack(torch.from_numpy(exact), TOP_K, no_cut)
    u, s, _ = np.linalg.svd(exact)
    np.testing.assert_allclose(found.values, s[:TOP_K], rtol=1e-12)
    assert np.abs((found.vectors.numpy() * u[:, :TOP_K].T).sum(axis=1)).min() > 1 - 1e-12
