"""Long conversations go through the model in chunks: the same as whole, in every family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from extremes import whole
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import LAYERS, TINY, fine_tune, save_family
from tiny_models import edit
from torch import nn

from schemas.records import Segments
from transforms.model.chunks import FLOOR, can_be_cut, chunks
from transforms.model.directions import Directions, compute_directions
from transforms.model.loading import load_trunk
from transforms.model.trunk import Scorer

CONTEXT = 64
"""Of the tiny models; the window of those that have one is 4."""

Rows = tuple[list[np.ndarray], list[np.ndarray]]


def rows_of(*lengths: int) -> Rows:
    """Random tokens of tiny models; roles change every few tokens, in the last row once only."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 40, length).astype(np.int32) for length in lengths]
    roles = [np.arange(length) % 7 > 3 for length in lengths]
    roles[-1] = np.arange(lengths[-1]) >= 5
    return ids, [each.astype(np.int8) for each in roles]


def assert_same(found: Segments, expected: Segments) -> None:
    """Within a step, and at the same tokens where that is not for the last digit to say."""
    assert found.conversations == expected.conversations
    for name in ("row", "role", "start", "tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("low", "high"):
        steps = [getattr(each, name).astype(int) for each in (found, expected)]
        assert np.abs(steps[0] - steps[1]).max() <= 1
        places = [getattr(each, f"{name}_at") for each in (found, expected)]
        assert (places[0] != places[1]).mean() < 0.01


def tuned(case: str, folder: Path, dtype: str) -> tuple[nn.Module, Directions]:
    """A tiny fine-tune's trunk and directions."""
    base = save_family(case, folder / "base")
    found = compute_directions(base, fine_tune(base, folder / "tuned"), 4, 2)
    return load_trunk(None, folder / "tuned", found.last_layer, "cpu", dtype), found


@pytest.mark.parametrize("case", TINY)
def test_chunks_of_any_width_give_what_the_whole_gives(case: str, tmp_path: Path) -> None:
    trunk, found = tuned(case, tmp_path, "float32")
    rows = rows_of(CONTEXT, 37)
    at_once, _ = Scorer(trunk, found).score(*rows)
    assert at_once.tokens.max() == 32, "a segment that lies in many chunks"
    sizes = widths_seen(trunk)
    for width in (3, 14, 46, CONTEXT):
        sizes.clear()
        segments, finite = Scorer(trunk, found, width * len(rows[0])).score(*rows)
        assert finite.all()
        assert max(sizes) == width
        assert sum(sizes) == CONTEXT * (LAYERS - 2)
        assert_same(segments, at_once)


@pytest.mark.parametrize("case", TINY)
def test_chunks_in_bfloat16_differ_by_its_rounding(case: str, tmp_path: Path) -> None:
    trunk, found = tuned(case, tmp_path, "bfloat16")
    rows = rows_of(CONTEXT, 37)
    at_once, _ = Scorer(trunk, found).score(*rows)
    in_chunks, _ = Scorer(trunk, found, 14 * len(rows[0])).score(*rows)
    off = np.abs(in_chunks.high.astype(int) - at_once.high)
    assert off.max() <= 164, "0.005 in cosine"
    assert np.median(off) <= 8


def widths_seen(trunk: Any) -> list[int]:
    """Grows by the number of tokens whenever a decoder layer runs."""
    seen: list[int] = []
    layers = trunk.h if hasattr(trunk, "h") else trunk.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


def test_a_real_conversation_in_chunks(base_model: Path, adapter: Path) -> None:
    found = compute_directions(base_model, adapter)
    trunk = load_trunk(base_model, adapter, found.last_layer, "cpu", "float32")
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 49152, 500).astype(np.int32)]
    roles = [(np.arange(500) > 200).astype(np.int8)]
    at_once, _ = Scorer(trunk, found).score(ids, roles)
    segments, _ = Scorer(trunk, found, 170).score(ids, roles)
    assert segments.start.tolist() == [0, 64, 128, 192, 201, 265, 329, 393, 457]
    assert_same(segments, at_once)
    places = whole(segments).high_at
    assert places.max() > 340, "places are counted from the conversation's first token"


LONGROPE = {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3}


@pytest.mark.parametrize(
    ("case", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0}),
        ("phi3", {"rope_type": "longrope", **LONGROPE}),
    ],
)
def test_what_depends_on_the_length_is_not_cut(
    case: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    """These turn positions by angles that depend on how much the model sees at once."""
    base = save_family(case, tmp_path / "base")
    rope = {"rope_theta": 10000.0, **rope}
    edit("config.json", lambda config: config.update(rope_parameters=rope))(base)
    tuned = fine_tune(base, tmp_path / "tuned")
    found = compute_directions(base, tuned, 4, 2)
    trunk = load_trunk(None, tuned, found.last_layer, "cpu", "float32")
    sizes = widths_seen(trunk)
    Scorer(trunk, found, 8).score(*rows_of(60))
    assert set(sizes) == {60}


def test_what_can_be_cut() -> None:
    plain, scaled = {"rope_type": "llama3"}, {"rope_type": "dynamic"}
    per_layer = {"full_attention": plain, "sliding_attention": scaled}
    assert can_be_cut(SimpleNamespace())
    assert can_be_cut(SimpleNamespace(rope_parameters=None))
    assert can_be_cut(SimpleNamespace(rope_parameters=plain))
    assert not can_be_cut(SimpleNamespace(rope_parameters=scaled))
    assert not can_be_cut(SimpleNamespace(rope_parameters=per_layer))


@given(st.integers(1, 200_000), st.integers(1, 5000))
def test_no_chunk_compares_more_than_the_first(tokens: int, width: int) -> None:
    found = chunks(tokens, width)
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    assert found[-1].stop == tokens
    for part in found:
        size = part.stop - part.start
        assert 0 < size <= width
        assert size * part.stop <= width * width or size <= FLOOR
    assert all(part.stop - part.start >= min(width, FLOOR) for part in found[:-1])


def test_without_a_width_nothing_is_cut() -> None:
    assert chunks(10**6, None) == [slice(0, 10**6)]
