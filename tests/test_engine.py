"""What an engine says of its model before it loads it, and how often it loads it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import TINY, save_family
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigurationError
from schemas.records import Header, Position, Tokenized
from transforms.model import directions, loading
from transforms.model.engine import Engine, TrunkEngine
from transforms.model.loading import load_shared_trunk, load_trunk
from transforms.model.shared import AdapterEngine, Adapters
from transforms.model.trunk import Scorer
from transforms.score import Score

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


def with_tokens(case: str, base: Any, out: Path, tokens: int, **options: Any) -> Any:
    """Save an adapter of a model whose vocabulary was resized first; give the model as merged."""
    torch.manual_seed(5)
    base.resize_token_embeddings(tokens, mean_resizing=False)
    usual = {"r": 3, "target_modules": list(TINY[case].targets), "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**usual | TINY[case].more | options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    model.save_pretrained(out)
    return model.merge_and_unload().eval()


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_stream(model: Any, base: Path, *tuned: Path) -> None:
    """After layer 2, of every token the model knows."""
    known = engine(base, *tuned).vocabulary
    assert known == model.get_input_embeddings().num_embeddings
    ids = torch.arange(known)[None]
    trunk = load_trunk(base, tuned, 2, "cpu", "float32")
    with torch.inference_mode():
        found = trunk(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(ids, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def engine(base: Path | None, *tuned: Path) -> TrunkEngine:
    return TrunkEngine(base, tuned, Path("unread"))


@pytest.mark.parametrize("named", [True, False], ids=["beside its base", "alone"])
def test_of_a_full_checkpoint_its_own_tokens_and_context_count(
    base: Path, tmp_path: Path, named: bool
) -> None:
    tuned = longer(base, tmp_path / "tuned")
    found = engine(base if named else None, tuned)
    assert (found.vocabulary, found.context) == (TOKENS + 2, 2 * CONTEXT)


RESIZED: dict[str, dict[str, Any]] = {
    "LoRA alone": {},
    "embeddings and head trained whole": {"modules_to_save": ["embed_tokens", "wte", "lm_head"]},
    "the head trained whole": {"modules_to_save": ["lm_head"]},
    "new tokens trained": {"trainable_token_indices": [TOKENS, TOKENS + 1]},
}


@pytest.mark.parametrize("case", ["llama", "gpt2"], ids=["a head of its own", "head tied"])
@pytest.mark.parametrize("how", RESIZED)
def test_an_adapter_may_bring_tokens_of_its_own(tmp_path: Path, case: str, how: str) -> None:
    base, tuned = save_family(case, tmp_path / "base"), tmp_path / "tuned"
    model = with_tokens(case, loaded(base), tuned, TOKENS + 2, **RESIZED[how])
    assert_same_stream(model, base, tuned)


def test_an_adapter_may_have_fewer_tokens_than_a_padded_base(base: Path, tmp_path: Path) -> None:
    model = with_tokens("llama", loaded(base), tmp_path / "tuned", TOKENS - 3)
    assert_same_stream(model, base, tmp_path / "tuned")


def test_tokens_of_adapters_upon_each_other(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    once = with_tokens("llama", loaded(base), first, TOKENS + 2)
    twice = with_tokens("llama", once, second, TOKENS + 5, target_modules=["q_proj"])
    assert_same_stream(twice, base, first, second)


def test_an_adapter_whose_tokens_are_lost_is_refused_with_what_does_not_fit(
    base: Path, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    with_tokens("llama", loaded(base), tuned, TOKENS + 2)
    path = tuned / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "embed_tokens" not in k}, path)
    assert engine(base, tuned).vocabulary == TOKENS
    with pytest.raises(ConfigurationError, match=r"mismatch for \S+lm_head.*\[42,.*\[40,") as no:
        load_trunk(base, tuned, 2)
    assert "\n" not in str(no.value)


def test_an_adapter_that_trained_tokens_it_does_not_bring_is_refused(
    base: Path, tmp_path: Path
) -> None:
    tuned, options = tmp_path / "tuned", RESIZED["new tokens trained"]
    with_tokens("llama", loaded(base), tuned, TOKENS + 2, **options)
    path = tuned / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "base_layer" not in k}, path)
    with pytest.raises(ConfigurationError, match=r"cannot load adapter .* out of bounds"):
        load_trunk(base, tuned, 2)


def test_tokens_of_an_adapter_are_not_put_into_a_base_that_others_share(
    base: Path, tmp_path: Path
) -> None:
    with_tokens("llama", loaded(base), tmp_path / "tuned", TOKENS + 2)
    words = r"brings \S+(lm_head|embed_tokens)\.weight whole, .* alone"
    with pytest.raises(ConfigurationError, match=words) as no:
        load_shared_trunk(base, [[tmp_path / "tuned"]], 2)
    assert "\n" not in str(no.value)


# --- one model per process ----------------------------------------------------------------------

WORKERS = 4


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every load of a trunk, by the name of its function; each takes long enough to be met."""
    seen: list[str] = []

    def counted(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            seen.append(name)
            time.sleep(0.2)
            return load(*args)

        return slow

    for name in ("load_trunk", "load_shared_trunk"):
        monkeypatch.setattr(loading, name, counted(name, getattr(loading, name)))
    return seen


def watched(base: Path, out: Path, kind: str) -> Engine:
    """An engine with directions: of a base with one adapter, merged or beside it."""
    with_tokens("llama", loaded(base), out / "tuned", TOKENS)
    tuned = (out / "tuned",)
    directions.save(directions.compute_directions(base, tuned[0]), out / "directions")
    if kind == "load_trunk":
        return TrunkEngine(base, tuned, out / "directions", "cpu")
    return AdapterEngine(Adapters(base, (tuned,), (out / "directions",), "cpu"), 0)


@pytest.mark.parametrize("kind", ["load_trunk", "load_shared_trunk"])
def test_threads_that_ask_at_once_get_one_model(
    base: Path, tmp_path: Path, loads: list[str], kind: str
) -> None:
    one, got, start = watched(base, tmp_path, kind), [], threading.Barrier(WORKERS)

    def ask() -> None:
        start.wait()
        got.append(one.scorer())

    threads = [threading.Thread(target=ask) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == WORKERS
    assert len(set(map(id, got))) == 1
    assert loads == [kind]


def batch(number: int) -> list[Tokenized]:
    header = Header(Position("file://log", 0, number), None, None, 0, False)
    ids = np.arange(5, 15, dtype=np.int32)
    return [Tokenized(header, "m", str(number), ids, (ids > 9).astype(np.int8), False)]


def test_workers_of_one_graph_after_the_other_share_one_model(
    base: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beam's in-process runner with several threads that work."""
    seen: dict[int, Scorer] = {}
    score = Scorer.score

    def noted(self: Scorer, *rows: Any) -> Any:
        seen[threading.get_ident()] = self
        return score(self, *rows)

    monkeypatch.setattr(Scorer, "score", noted)
    one = watched(base, tmp_path, "load_trunk")
    options = PipelineOptions(direct_num_workers=WORKERS, direct_running_mode="multi_threading")
    for _ in range(2):
        with beam.Pipeline(runner=FnApiRunner(), options=options) as pipeline:
            made = pipeline | beam.Create([batch(number) for number in range(64)])
            made | beam.Reshuffle() | Score({"m": one})
    assert len(seen) > 1, "one thread scored everything"
    assert len(set(map(id, seen.values()))) == 1
    assert loads == ["load_trunk"]
