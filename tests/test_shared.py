"""Adapters that share a base in memory: each scores as PEFT's merged model of it alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cheap_scorer import segments_of
from peft import PeftModel
from tiny_families import TINY, save_family, train
from tiny_models import edit

from schemas.errors import ConfigurationError
from schemas.records import STEPS_PER_UNIT, Segments
from transforms.model import directions, loading
from transforms.model.adapter import check_shareable
from transforms.model.directions import Directions, compute_directions
from transforms.model.shared import AdapterEngine, Adapters
from transforms.model.trunk import Scorer

SKIPPED = (2, 1, 2)
"""Final layers without directions, by model: the second's reach a layer further."""

LINEAR = [case for case, tiny in TINY.items() if not tiny.parameters]
"""Families whose LoRA is of linear layers only."""

Rows = tuple[list[np.ndarray], list[np.ndarray]]


def rows(seed: int) -> Rows:
    """Random tokens of tiny models, and roles that change every few tokens."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 40, length).astype(np.int32) for length in (5, 21, 30)]
    return ids, [(np.arange(len(each)) % 7 > 3).astype(np.int8) for each in ids]


def made(case: str, folder: Path) -> Adapters:
    """A base with three models: an adapter, another of other rank, and both upon each other."""
    base = save_family(case, folder / "base")
    first = train(case, base, folder / "first")
    second = train(case, base, folder / "second", r=5, lora_alpha=2, use_rslora=True)
    tuned = ((first,), (second,), (first, second))
    for number, (own, skipped) in enumerate(zip(tuned, SKIPPED, strict=True)):
        directions.save(compute_directions(base, own, 3, skipped), folder / f"directions-{number}")
    artefacts = tuple(folder / f"directions-{number}" for number in range(3))
    return Adapters(base, tuned, artefacts, "cpu", "float32", 40)


def merged(base: Path, tuned: Sequence[Path]) -> Any:
    """PEFT's model with the adapters merged, in float64."""
    model: Any = loading._from_folder(base, torch.float64)
    for adapter in tuned:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()


def expected(model: Any, artefact: Directions, batch: Rows) -> list[list[float]]:
    """Lowest, then highest cosine by direction, per segment, from all hidden states."""
    found: list[list[float]] = []
    for ids, roles in zip(*batch, strict=True):
        with torch.no_grad():
            out = model.base_model(
                torch.tensor(ids[None].astype(np.int64)), output_hidden_states=True
            )
        states = [state[0].numpy() for state in out.hidden_states]
        table = np.array(
            [
                states[entry.layer + 1] @ vector / np.linalg.norm(states[entry.layer + 1], axis=1)
                for entry, vector in zip(artefact.entries, artefact.vectors, strict=True)
            ]
        )
        parts = [table[:, start:end] for start, end in segments_of(roles.tolist())]
        found += [[*part.min(1), *part.max(1)] for part in parts]
    return found


def steps(segments: Segments) -> np.ndarray:
    return np.hstack([segments.low, segments.high]).astype(float)


@pytest.mark.parametrize("case", LINEAR)
def test_every_model_scores_as_merged_alone_whatever_was_scored_before(
    case: str, tmp_path: Path
) -> None:
    shared = made(case, tmp_path)
    engines = [AdapterEngine(shared, which) for which in range(3)]
    first = [engine.scorer().score(*rows(which)) for which, engine in enumerate(engines)]
    for which in (1, 0, 2, 0, 2, 1):
        segments, finite = engines[which].scorer().score(*rows(which))
        assert finite.all()
        np.testing.assert_array_equal(steps(segments), steps(first[which][0]))
    for which, (segments, _) in enumerate(first):
        artefact = directions.load(shared.directions[which])
        oracle = expected(merged(shared.base, shared.tuned[which]), artefact, rows(which))
        apart = steps(segments) - np.array(oracle) * STEPS_PER_UNIT
        assert np.abs(apart).max() < 1.5, "a step, and half of one for rounding"
        trunk = loading.load_trunk(shared.base, shared.tuned[which], artefact.last_layer, "cpu")
        alone, _ = Scorer(trunk, artefact).score(*rows(which))
        assert np.abs(steps(segments) - steps(alone)).max() <= 1
    assert np.abs(steps(first[0][0]) - steps(engines[0].scorer().score(*rows(1))[0])).max() > 100


def test_the_base_is_there_once_and_ends_where_no_model_looks_further(tmp_path: Path) -> None:
    shared = made("llama", tmp_path)
    artefacts = [directions.load(folder) for folder in shared.directions]
    last = max(artefact.last_layer for artefact in artefacts)
    assert last > artefacts[0].last_layer
    trunk, names = loading.load_shared_trunk(shared.base, shared.tuned, last, "cpu", "bfloat16")
    assert names == [["0"], ["1"], ["0", "1"]]
    assert {weight.dtype for weight in trunk.parameters()} == {torch.bfloat16}
    alone = loading.load_trunk(shared.base, shared.tuned[0], last, "cpu", "bfloat16")
    sizes = {name: weight.numel() for name, weight in trunk.named_parameters()}
    base = sum(size for name, size in sizes.items() if ".lora_" not in name)
    assert base == sum(weight.numel() for weight in alone.parameters())
    factors = [name for name in sizes if ".lora_" in name]
    assert {name.rsplit(".", 2)[1] for name in factors} == {"0", "1"}


@pytest.mark.parametrize(
    "change",
    [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1]}],
    ids=lambda change: next(iter(change)),
)
def test_more_than_lora_has_to_be_watched_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    base = save_family("llama", tmp_path / "base")
    adapter = train("llama", base, tmp_path / "adapter")
    edit("adapter_config.json", lambda config: config.update(change))(adapter)
    with pytest.raises(ConfigurationError, match=f"has {next(iter(change))}=.*alone") as caught:
        loading.load_shared_trunk(base, [[adapter]], 1)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_does_not_share(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="adapters over one base"):
        check_shareable(save_family("llama", tmp_path / "base"))
