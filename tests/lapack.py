"""Directions by the textbook: LAPACK's SVD, float64, of the difference of two loaded models."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Svd = tuple[np.ndarray, np.ndarray]


def svd_of_merged_difference(base: Path, tuned: Path, layers: Iterable[int]) -> dict[str, Svd]:
    """Of the adapter `tuned`: left singular vectors (columns) and values, by matrix: "O3", "D3"."""
    merged = PeftModel.from_pretrained(_load(base), str(tuned)).merge_and_unload()
    return _svd_of_difference(_load(base), merged, layers)


def svd_of_checkpoints(base: Path, tuned: Path, layers: Iterable[int]) -> dict[str, Svd]:
    """Of the full checkpoint `tuned`, likewise."""
    return _svd_of_difference(_load(base), _load(tuned), layers)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def _svd_of_difference(plain: Any, tuned: Any, layers: Iterable[int]) -> dict[str, Svd]:
    before = dict(_writers(plain, layers))
    return {
        name: np.linalg.svd(after - before[name], full_matrices=False)[:2]
        for name, after in _writers(tuned, layers)
    }


def _writers(model: torch.nn.Module, layers: Iterable[int]) -> Iterator[tuple[str, np.ndarray]]:
    for layer in layers:
        block = model.model.layers[layer]
        yield f"O{layer}", block.self_attn.o_proj.weight.detach().numpy()
        yield f"D{layer}", block.mlp.down_proj.weight.detach().numpy()


def largest_component_positive(vector: np.ndarray) -> np.ndarray:
    """The sign rule of directions."""
    return vector * np.sign(vector[np.abs(vector).argmax()])
