"""What an engine says of its model before it loads it, and how often it loads it."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from transforms.model.engine import TrunkEngine

TOKENS, CONTEXT = 40, 2048
"""Of the tiny base."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def longer(base: Path, out: Path) -> Path:
    """A full checkpoint with two more tokens and twice the context."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(TOKENS + 2, mean_resizing=False)
    model.config.max_position_embeddings = 2 * CONTEXT
    model.save_pretrained(out)
    return out


def engine(base: Path | None, *tuned: Path) -> TrunkEngine:
    return TrunkEngine(base, tuned, Path("unread"))


@pytest.mark.parametrize("named", [True, False], ids=["beside its base", "alone"])
def test_of_a_full_checkpoint_its_own_tokens_and_context_count(
    base: Path, tmp_path: Path, named: bool
) -> None:
    tuned = longer(base, tmp_path / "tuned")
    found = engine(base if named else None, tuned)
    assert (found.vocabulary, found.context) == (TOKENS + 2, 2 * CONTEXT)
