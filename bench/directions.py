"""Directions of one large matrix against LAPACK's SVD of it, float32, in the same threads.

Matrices of four kinds of spectrum, made here with singular vectors from signs and Hartley
transforms. Prints a table and, as its last line, one JSON object: `worst_cos` among vectors whose
singular value is 1% or more from its neighbours', `worst_energy` of the others (along a vector,
over that along LAPACK's of the same rank), `time_ratio` to LAPACK of the kind with the largest.
Kinds where the fast way fell back to LAPACK are counted in `fallbacks`, not in `time_ratio`.

`adapter_ms`: a LoRA adapter of rank 16 for a matrix of that shape.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transforms.model import adapter, svd

GAP = 0.01
RANK = 16
RUNS = 3
"""Of which the median counts; LAPACK takes so long that it is timed once."""


def main() -> None:
    """Measure the kinds asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    known = parser.parse_args()
    shape = known.rows, known.columns
    measured = {}
    _print_row("kind", *COLUMNS)
    for kind in known.kind:
        torch.manual_seed(0)
        measured[kind] = measure(KINDS[kind](*shape), known.top_k)
        _print_row(kind, *(f"{measured[kind][column]:.6g}" for column in COLUMNS))
    print(json.dumps({**summary(measured), "adapter_ms": round(adapter_ms(*shape), 2)}))


COLUMNS = ("cos", "energy", "seconds", "lapack", "ratio", "fallback")


def measure(matrix: Tensor, top_k: int) -> dict[str, float]:
    """Figures of one float32 matrix; see the module for what they are."""
    runs = [timed(lambda: directions_of(matrix, top_k)) for _ in range(RUNS)]
    lapack, (u, values, _) = timed(lambda: torch.linalg.svd(matrix, full_matrices=False))
    seconds, found = sorted(runs, key=lambda run: run[0])[RUNS // 2]
    times = {"seconds": seconds, "lapack": lapack, "ratio": seconds / lapack}
    return {**compare(matrix, found.vectors, u.T, values), **times, "fallback": found.fallback}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds it takes, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def directions_of(matrix: Tensor, top_k: int) -> svd.Leading:
    """What is done with the difference of two large matrices, without a cut."""

    def gram(dtype: torch.dtype) -> Tensor:
        return svd.gram_of(lambda start, end: matrix[start:end].double(), len(matrix), dtype)

    return svd.by_grams(gram, top_k, lambda values, energy: 0.0)


def compare(matrix: Tensor, found: Tensor, exact: Tensor, values: Tensor) -> dict[str, float]:
    """Lowest |cos| where there is a gap, lowest energy elsewhere; NaN where there is none."""
    count = len(found)
    cosines = (found * exact[:count]).sum(dim=1).abs()
    along, of_exact = (_energies(matrix, rows) for rows in (found, exact[:count].double()))
    between = (values[:count] - values[1 : count + 1]) / values[:count]
    above = torch.cat([torch.ones(1), between[:-1]])
    apart = torch.minimum(above, between) >= GAP
    return {"cos": _least(cosines[apart]), "energy": _least((along / of_exact)[~apart])}


def _energies(matrix: Tensor, rows: Tensor) -> Tensor:
    """Squared length of every row's product with the matrix, float64."""
    pieces = [rows @ part.double() for part in matrix.split(1024, dim=1)]
    return sum((piece.square().sum(dim=1) for piece in pieces), torch.zeros(len(rows)))


def _least(values: Tensor) -> float:
    return float(values.min()) if len(values) else float("nan")


def summary(measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The worst of all kinds."""
    fast = [each["ratio"] for each in measured.values() if not each["fallback"]]
    cosines = [each["cos"] for each in measured.values() if each["cos"] == each["cos"]]
    energies = [each["energy"] for each in measured.values() if each["energy"] == each["energy"]]
    return {
        "worst_cos": min(cosines, default=None),
        "worst_energy": min(energies, default=None),
        "time_ratio": max(fast, default=None),
        "fallbacks": len(measured) - len(fast),
        "threads": torch.get_num_threads(),
    }


def adapter_ms(rows: int, columns: int, times: int = 20) -> float:
    """Milliseconds an adapter takes for one matrix, the median of some."""
    b, a = torch.randn(rows, RANK), torch.randn(RANK, columns)
    pair = adapter.Factors("a matrix", a, b, 1.0)
    taken = [timed(lambda: adapter.left_singular(pair, RANK))[0] for _ in range(times)]
    return 1000 * sorted(taken)[times // 2]


def with_values(values: Tensor, columns: int) -> Tensor:
    """A matrix [len(values), columns] with these singular values and mixed singular vectors."""
    matrix = torch.zeros(len(values), columns)
    matrix[:, : len(values)] = torch.diag(values)
    return _mixed(_mixed(matrix).T.contiguous()).T.contiguous()


def _mixed(rows: Tensor) -> Tensor:
    """Rows times an orthogonal matrix without structure."""
    for _ in range(2):
        signs = torch.randint(0, 2, (rows.shape[1],)) * 2 - 1
        waves = torch.fft.fft(rows * signs)
        rows = (waves.real - waves.imag) / rows.shape[1] ** 0.5
    return rows


def noise(rows: int, columns: int) -> Tensor:
    """Independent normal elements: singular values without gaps, the largest about 1."""
    return torch.randn(rows, columns) / (rows**0.5 + columns**0.5)


def power_law(rows: int, columns: int) -> Tensor:
    """Singular value i is 1 / sqrt(i)."""
    return with_values(torch.arange(1, rows + 1).float().rsqrt(), columns)


def low_rank_plus_noise(rows: int, columns: int) -> Tensor:
    """Eight singular values from 1 to 0.1 over noise of 0.05."""
    values = torch.zeros(rows)
    values[:8] = torch.linspace(1, 0.1, 8)
    return with_values(values, columns) + 0.05 * noise(rows, columns)


def bf16_rounded(rows: int, columns: int) -> Tensor:
    """What is left of a power law of falling rank when weights of 0.02 are saved as bfloat16."""
    base = (0.02 * torch.randn(rows, columns)).bfloat16()
    values = torch.arange(1, rows + 1).float().reciprocal()
    tuned = (base.float() + 2 * with_values(values, columns)).bfloat16()
    return tuned.float() - base.float()


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "power-law": power_law,
    "low-rank-plus-noise": low_rank_plus_noise,
    "bf16-rounded": bf16_rounded,
    "flat": noise,
}


def _print_row(kind: str, *cells: str) -> None:
    print(f"{kind:<22}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
