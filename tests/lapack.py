"""Directions by the textbook: LAPACK's SVD of the difference that PEFT's own merge makes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Svd = tuple[np.ndarray, np.ndarray]


def svd_of_merged_difference(base: Path, tuned: Path, layers: Iterable[int]) -> dict[str, Svd]:
    """Left singular vectors (columns) and singular values, float64, by matrix: "O3", "D3"."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged = PeftModel.from_pretrained(merged, str(tuned)).merge_and_unload()
    before = dict(_writers(plain, layers))
    return {
        name: np.linalg.svd(after - before[name], full_matrices=False)[:2]
        for name, after in _writers(merged, layers)
    }


def _writers(model: torch.nn.Module, layers: Iterable[int]) -> Iterator[tuple[str, np.ndarray]]:
    for layer in layers:
        block = model.model.layers[layer]
        yield f"O{layer}", block.self_attn.o_proj.weight.detach().numpy()
        yield f"D{layer}", block.mlp.down_proj.weight.detach().numpy()


def largest_component_positive(vector: np.ndarray) -> np.ndarray:
    """The sign rule of directions."""
    return vector * np.sign(vector[np.abs(vector).argmax()])
