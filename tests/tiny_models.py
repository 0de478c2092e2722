"""Models of a few kilobytes in Hugging Face's layout, and damage done to such folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INTERMEDIATE, LAYERS = 24, 36, 5


def save_tiny(
    folder: Path,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    seed: int = 0,
    intermediate: int = INTERMEDIATE,
) -> Path:
    """Save a random Llama, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """What changes the JSON file of this name in a folder."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply
