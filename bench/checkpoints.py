"""Directions of full checkpoints against those of the adapter they were merged from.

Merges the shipped adapter into its base in several dtypes and ways, computes the directions of
every merged checkpoint, and compares them with the adapter's own, which are exact. Prints a table
and, as its last line, one JSON object. `--case` takes some of the cases only.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.demo.assets import base_model
from transforms.model.directions import Directions, compute_directions

Case = Callable[[Path, Path, Path], tuple[Path, Path]]
"""Takes base, adapter and a folder to write; returns the base and tuned to compare."""

LIMITS = (0.9999, 0.999, 0.99, 0.95)
NOISE = 0.5
"""A direction whose projection on the adapter's own is shorter than this is called noise."""


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--adapter", type=Path, default=Path("examples/badnet"))
    known = parser.parse_args()
    base = base_model(known.build.resolve() / "models/base")
    measured = {name: measure(name, base, known.adapter) for name in known.case}
    _print_table(measured)
    print(json.dumps(measured))


def measure(name: str, base: Path, adapter: Path) -> dict[str, float]:
    """Figures of one case; see `_print_table` for what they are."""
    exact = compute_directions(base, adapter)
    with tempfile.TemporaryDirectory() as folder:
        before, after = CASES[name](base, adapter, Path(folder))
        started = time.monotonic()
        found = compute_directions(before, after)
        seconds = time.monotonic() - started
    return {**compare(found, exact), "seconds": round(seconds, 1)}


def compare(found: Directions, exact: Directions) -> dict[str, float]:
    """Cosines of directions of the same name, and how much of each lies among the exact ones."""
    true, cosines, inside = _by_matrix(exact), [], []
    for matrix, rows in _by_matrix(found).items():
        products = np.abs(rows @ true[matrix].T)
        cosines += list(products.diagonal())
        inside += list(np.linalg.norm(products, axis=1))
    floors = found.manifest.rounding
    first = {e.name: e.singular_value for e in exact.entries if e.index == 0}
    return {
        "exact": len(exact),
        "kept": len(found),
        "noise": int(np.sum(np.array(inside) < NOISE)),
        "worst": float(min(cosines)),
        **{f">={limit}": int(np.sum(np.array(cosines) >= limit)) for limit in LIMITS},
        "highest_floor": max(floors[name].floor / first[f"{name}_u0"] for name in floors),
    }


def _by_matrix(directions: Directions) -> dict[str, NDArray[np.float64]]:
    matrices = [entry.name.partition("_")[0] for entry in directions.entries]
    rows = {name: [i for i, other in enumerate(matrices) if other == name] for name in matrices}
    return {name: directions.vectors[at].astype(np.float64) for name, at in rows.items()}


def _load(base: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def _merged(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    return PeftModel.from_pretrained(_load(base, dtype), str(adapter)).merge_and_unload()


def _cast(dtype: torch.dtype) -> Case:
    """Merge in float32, then cast."""

    def case(base: Path, adapter: Path, out: Path) -> tuple[Path, Path]:
        _merged(base, adapter, torch.float32).to(dtype).save_pretrained(out)
        return base, out

    return case


def _merged_in(dtype: torch.dtype) -> Case:
    """Load the base in `dtype` and merge there."""

    def case(base: Path, adapter: Path, out: Path) -> tuple[Path, Path]:
        _merged(base, adapter, dtype).save_pretrained(out)
        return base, out

    return case


def _onto_bfloat16(dtype: torch.dtype) -> Case:
    """Merge in `dtype` onto a base that is bfloat16 from the beginning."""

    def case(base: Path, adapter: Path, out: Path) -> tuple[Path, Path]:
        _load(base, torch.bfloat16).save_pretrained(out / "base")
        _merged(out / "base", adapter, dtype).save_pretrained(out / "tuned")
        return out / "base", out / "tuned"

    return case


CASES: dict[str, Case] = {
    "float32": _cast(torch.float32),
    "float16": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "in-float16": _merged_in(torch.float16),
    "in-bfloat16": _merged_in(torch.bfloat16),
    "bfloat16-base-float32": _onto_bfloat16(torch.float32),
    "bfloat16-base-bfloat16": _onto_bfloat16(torch.bfloat16),
}


def _print_table(measured: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(measured.values())))
    print(f"{'case':<24}" + "".join(f"{column:>14}" for column in columns))
    for name, figures in measured.items():
        print(f"{name:<24}" + "".join(f"{figures[column]:>14.5g}" for column in columns))


if __name__ == "__main__":
    main()
