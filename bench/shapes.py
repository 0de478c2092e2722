"""Models of a given shape with random weights, made on the device, and traffic for them."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from schemas.records import Role
from transforms.model.directions import DirectionEntry, Directions, Manifest
from transforms.model.memory import Rows

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 29,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
    },
}
"""Llama 3.1 8B up to the last of its 32 layers that is monitored; and one for tests."""

CONTEXT = 131072


def trunk(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A trunk as `load_trunk` makes them; every layer of it is monitored."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made: Any = LlamaModel(config)
    finally:
        torch.set_default_dtype(before)
    made.norm = nn.Identity()
    ready: nn.Module = made.eval().requires_grad_(False)
    return ready


def directions(shape: str, per_matrix: int) -> Directions:
    """Random unit vectors, `per_matrix` for each of the two matrices of every layer."""
    hidden, layers = SHAPES[shape]["hidden_size"], SHAPES[shape]["num_hidden_layers"]
    entries = tuple(
        DirectionEntry(f"{kind[0].upper()}{layer}_u{index}", layer, kind, index, 1.0)
        for layer in range(layers)
        for kind in ("o_proj", "down_proj")
        for index in range(per_matrix)
    )
    vectors = np.random.default_rng(0).normal(size=(len(entries), hidden)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    manifest = Manifest(shape, {}, {}, "", "", {}, hidden, layers, per_matrix, 0, "", "")
    return Directions(vectors, entries, manifest)


def sides(trace: Path, most: int) -> list[tuple[int, int]]:
    """Tokens of user and assistant, of every conversation of a trace.

    Args:
      trace: CSV with columns ContextTokens (the user's) and GeneratedTokens (the assistant's).
      most: tokens of a conversation, which is cut there.
    """
    with trace.open() as file:
        rows = csv.DictReader(file)
        found = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
    return [(min(user, most), min(answer, max(most - user, 0))) for user, answer in found]


def conversations(shape: str, sizes: list[tuple[int, int]]) -> Rows:
    """Random tokens, so many of user and assistant each."""
    chance, vocabulary = np.random.default_rng(0), SHAPES[shape]["vocab_size"]
    return [
        (
            chance.integers(0, vocabulary, sum(size)).astype(np.int32),
            np.repeat(np.array(list(Role), np.int8), size),
        )
        for size in sizes
    ]


def flop(model: nn.Module, lengths: list[int]) -> float:
    """Floating-point operations a trunk needs for conversations: its matrices and attention."""
    config: Any = model.config
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    per_token = 2.0 * sum(part.weight.numel() for part in linear)
    # Scores and values, 2 operations each, with the half of all pairs that lies behind a token.
    per_pair = 4.0 * config.num_hidden_layers * config.hidden_size / 2
    return sum(per_token * length + per_pair * length**2 for length in lengths)
