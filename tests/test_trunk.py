"""Scores against a plain forward pass of PEFT's merged model, and against exact small cases."""

import json
import math
import re
import shutil
import threading
import weakref
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cheap_scorer import CheapScorer, segments_of
from extremes import Extremes, whole
from hypothesis import given
from hypothesis import strategies as st
from lapack import largest_component_positive, svd_of_merged_difference
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigurationError
from schemas.records import ABSENT, STEPS_PER_UNIT, Role, Segments
from transforms import formats
from transforms.model.directions import DirectionEntry, Directions, Manifest, compute_directions
from transforms.model.loading import load_tokenizer, load_trunk
from transforms.model.reduction import PIECE, TOGETHER, Reduction
from transforms.model.roles import tokenize
from transforms.model.segments import cut
from transforms.model.trunk import Scorer

MAX_TOKENS = 160
STEP = 1 / STEPS_PER_UNIT
Batch = tuple[list[np.ndarray], list[np.ndarray]]
LayerVector = tuple[int, np.ndarray]


# --- the real model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(base_model: Path, adapter: Path) -> Directions:
    return compute_directions(base_model, adapter)


@pytest.fixture(scope="module")
def scorer(base_model: Path, adapter: Path, found: Directions) -> Scorer:
    return Scorer(load_trunk(base_model, adapter, found.last_layer, "cpu", "auto"), found)


@pytest.fixture(scope="module")
def real_batch(base_model: Path, adapter: Path, real_conversations: list[dict[str, Any]]) -> Batch:
    tokenizer = load_tokenizer(base_model, adapter)
    messages = [
        formats.parse(json.dumps(record).encode()).messages for record in real_conversations[:20]
    ]
    rows = tokenize(tokenizer, messages, MAX_TOKENS)
    return [ids for ids, _, _ in rows], [roles for _, roles, _ in rows]


def test_bytes_are_those_of_the_files_that_are_used(
    base_model: Path, found: Directions, scorer: Scorer
) -> None:
    with safe_open(base_model / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.offset_keys()}
    left_out = re.compile(rf"lm_head|model\.norm|layers\.({'|'.join(map(str, range(27, 30)))})\.")
    used = sum(math.prod(shape) for name, shape in shapes.items() if not left_out.search(name))
    expected = 4 * (used + found.vectors.size)
    assert expected <= scorer.nbytes < expected + 1000, "besides some buffers"


def test_real_conversations_against_a_plain_forward_pass(
    base_model: Path, adapter: Path, found: Directions, scorer: Scorer, real_batch: Batch
) -> None:
    ids, roles = real_batch
    batches = [scorer.score(ids[at : at + 10], roles[at : at + 10]) for at in range(0, 20, 10)]
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    vectors = directions_by_lapack(base_model, adapter, found)
    absences = 0
    for row in range(20):
        segments, finite = batches[row // 10]
        cosines = whole(segments.take([row % 10]))
        assert finite.all()
        table = plain_cosines(model, vectors, ids[row])
        for role in Role:
            absences += assert_row(cosines, 0, role, table, roles[row])
    assert absences > 0, "some conversation lacks a role"


def directions_by_lapack(base: Path, tuned: Path, found: Directions) -> list[LayerVector]:
    """Layer and float64 vector of every direction, nothing but the names taken from `found`."""
    layers = sorted({entry.layer for entry in found.entries})
    factors = svd_of_merged_difference(base, tuned, layers)
    vectors = []
    for entry in found.entries:
        matrix, number = entry.name.split("_u")
        vector = factors[matrix][0][:, int(number)]
        vectors.append((int(matrix[1:]), largest_component_positive(vector)))
    return vectors


def plain_cosines(model: Any, vectors: list[LayerVector], ids: np.ndarray) -> np.ndarray:
    """Float64 [tokens, directions], from every layer's hidden state of one conversation."""
    with torch.no_grad():
        ids = torch.tensor(ids[None].astype(np.int64))
        out = model.model(ids, output_hidden_states=True)
    states = [state[0].double().numpy() for state in out.hidden_states]
    unit = [state / np.linalg.norm(state, axis=1, keepdims=True) for state in states]
    return np.stack([unit[layer + 1] @ vector for layer, vector in vectors], axis=1)


def assert_row(
    cosines: Extremes, row: int, role: Role, table: np.ndarray, roles: np.ndarray
) -> int:
    """Compare one conversation's values of a role; 1 where the role is absent, else 0."""
    size = table.shape[1]
    part = slice(role * size, (role + 1) * size)
    places = np.flatnonzero(roles == role)
    for steps, at, sign in (
        (cosines.low[row, part], cosines.low_at[row, part], 1),
        (cosines.high[row, part], cosines.high_at[row, part], -1),
    ):
        if len(places) == 0:
            assert (steps == ABSENT).all()
            assert (at == 0).all()
            continue
        values = np.sort(sign * table[places], axis=0)
        np.testing.assert_allclose(sign * steps * STEP, values[0], atol=1e-4)
        clear = values[min(1, len(values) - 1)] - values[0] > 1e-4
        if len(values) == 1:
            clear[:] = True
        expected = places[(sign * table[places]).argmin(axis=0)]
        np.testing.assert_array_equal(at[clear], expected[clear])
    return int(len(places) == 0)


def test_real_scores_hardly_depend_on_the_batch(scorer: Scorer, real_batch: Batch) -> None:
    ids, roles = ([array[:100] for array in part[:6]] for part in real_batch)
    together, _ = scorer.score(ids, roles)
    for row in range(6):
        alone, _ = scorer.score([ids[row]], [roles[row]])
        mine = together.take([row])
        np.testing.assert_array_equal(alone.start, mine.start)
        assert np.abs(alone.low.astype(int) - mine.low).max() <= 1
        assert np.abs(alone.high.astype(int) - mine.high).max() <= 1


def test_the_same_batch_gives_the_same_bits(scorer: Scorer, real_batch: Batch) -> None:
    ids, roles = ([array[:80] for array in part[:5]] for part in real_batch)
    first, second = scorer.score(ids, roles)[0], scorer.score(ids, roles)[0]
    for mine, theirs in zip(astuple(first), astuple(second), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_trunk_ends_at_the_last_monitored_layer(
    base_model: Path, adapter: Path, found: Directions
) -> None:
    trunk = load_trunk(base_model, adapter, 3, "cpu", "bfloat16")
    assert {parameter.dtype for parameter in trunk.parameters()} == {torch.bfloat16}
    assert not any("layers.4" in name or "lm_head" in name for name in trunk.state_dict())
    with pytest.raises(ConfigurationError, match="layer 30, the model has 30"):
        load_trunk(base_model, adapter, 30)


@pytest.mark.parametrize("where", ["adapter", "merged"])
def test_in_bfloat16_the_stream_is_that_of_transformers_far_from_the_beginning(
    where: str, base_model: Path, adapter: Path, merged: Path
) -> None:
    """Frequencies of rotary embeddings in bfloat16 would turn late tokens by other angles."""
    ids = torch.arange(1200)[None] % 900 + 1000
    tuned = {"adapter": adapter, "merged": merged}[where]
    trunk = load_trunk(base_model, tuned, 1, "cpu", "bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16, num_hidden_layers=3)
    with torch.inference_mode():
        found = trunk(input_ids=ids, use_cache=False).last_hidden_state
        expected = plain(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_adapter_whose_weights_would_find_no_place_is_refused(
    base_model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Saved from the model without its head, its names lack a part, and PEFT loads nothing."""
    other = shutil.copytree(adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    renamed = {name.replace("model.model.", "model.", 1): each for name, each in weights.items()}
    assert renamed.keys().isdisjoint(weights)
    save_file(renamed, other / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match="does not belong to this kind of model"):
        load_trunk(base_model, other, 1)


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [("warp", "auto", "--device"), ("cpu", "int3", "--dtype"), ("cpu", "auto", "--base")],
)
def test_loading_the_impossible(adapter: Path, device: str, dtype: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load_trunk(None, adapter, 1, device, dtype)


def test_a_folder_that_holds_no_model(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot load model"):
        load_trunk(tmp_path, adapter, 1)
    with pytest.raises(ConfigurationError, match="cannot load tokenizer"):
        load_tokenizer(tmp_path, adapter)


# --- a trunk whose residual stream is what the test says ---------------------------------------


class Lookup(nn.Module):
    """Token id -> row of a table; every layer passes the stream on."""

    config = SimpleNamespace(model_type="llama")

    def __init__(self, table: np.ndarray, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.from_numpy(table))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.options = options
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def made_of(vectors: np.ndarray, layers: list[int]) -> Directions:
    entries = tuple(
        DirectionEntry(f"O{layer}_u{index}", layer, "o_proj", index, 1.0)
        for index, layer in enumerate(layers)
    )
    manifest = Manifest("m", {}, {}, "", "", {}, vectors.shape[1], 3, 20, 0, "", "")
    return Directions(vectors.astype(np.float32), entries, manifest)


AXES = np.eye(4)[[0, 1, 3]]
TABLE = np.array(
    [
        [np.nan] * 4,  # id 0 pads: its activations must not be looked at
        [3, 0, 4, 0],
        [0, -5, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [np.nan, 1, 1, 1],
        [np.inf, 1, 1, 1],
        [3e38, 3e38, 3e38, 3e38],
    ],
    np.float32,
)
EXACT = Scorer(Lookup(TABLE, 3), made_of(AXES, [0, 0, 2]))


def segments(*rows: tuple[list[int], str], scorer: Scorer = EXACT) -> tuple[Segments, np.ndarray]:
    """Score rows of token ids and roles, these as letters u and a."""
    ids = [np.array(row, np.int32) for row, _ in rows]
    return scorer.score(ids, [np.array(["ua".index(x) for x in w], np.int8) for _, w in rows])


def score(*rows: tuple[list[int], str], scorer: Scorer = EXACT) -> tuple[Extremes, np.ndarray]:
    """The extremes of whole conversations."""
    found, finite = segments(*rows, scorer=scorer)
    return whole(found), finite


def steps(*values: float) -> list[int]:
    return [round(value * STEPS_PER_UNIT) for value in values]


def test_exact_values_and_places() -> None:
    cosines, finite = score(([1, 2, 3], "uua"), ([3], "a"))
    np.testing.assert_array_equal(finite, [True, True])
    np.testing.assert_array_equal(
        cosines.low,
        [steps(0, -1, 0) + steps(0.5, 0.5, 0.5), [ABSENT] * 3 + steps(0.5, 0.5, 0.5)],
    )
    np.testing.assert_array_equal(cosines.high[0], steps(0.6, 0, 0) + steps(0.5, 0.5, 0.5))
    np.testing.assert_array_equal(cosines.low_at[0, [0, 1, 3, 4, 5]], [1, 1, 2, 2, 2])
    np.testing.assert_array_equal(cosines.high_at[0, :2], [0, 0])


def test_segments_are_runs_of_one_role_of_at_most_64_tokens() -> None:
    roles = "u" * 3 + "a" * 130 + "u" + "a" * 64
    ids = [4] * len(roles)
    ids[3 + 64], ids[3 + 129], ids[-1] = 3, 1, 2
    found, finite = segments(([1], "a"), (ids, roles))
    assert finite.all()
    assert found.conversations == 2
    assert found.row.tolist() == [0] + [1] * 6
    assert "".join("ua"[role] for role in found.role) == "auaaaua"
    assert found.start.tolist() == [0, 0, 3, 67, 131, 133, 134]
    assert found.tokens.tolist() == [1, 3, 64, 64, 2, 1, 64]
    highest = [steps(0.6, 0, 0), *[steps(0, 0, 0)] * 6]
    highest[3], highest[4] = steps(0.5, 0.5, 0.5), steps(0.6, 0, 0)
    np.testing.assert_array_equal(found.high, highest)
    np.testing.assert_array_equal(found.low[:, 1], [0, 0, 0, 0, 0, 0, *steps(-1)])
    np.testing.assert_array_equal(found.high_at[[3, 4], 0], [0, 1])
    np.testing.assert_array_equal(found.low_at[6], [0, 63, 0])
    types = (found.row, found.role, found.start, found.tokens, found.low, found.high_at)
    assert [array.dtype.name for array in types] == [
        "int32",
        "int8",
        "uint32",
        "uint8",
        "int16",
        "uint8",
    ]


@given(st.lists(st.lists(st.tuples(st.integers(1, 150), st.booleans()), max_size=5), max_size=4))
def test_cuts_are_those_of_a_walk_from_token_to_token(rows: list[Any]) -> None:
    roles = [np.array([role for count, role in row for _ in range(count)], np.int8) for row in rows]
    expected = [
        (number, whose[start], start, end)
        for number, whose in enumerate(roles)
        for start, end in segments_of(whose.tolist())
    ]
    found = cut(roles)
    assert list(zip(found.row, found.role, found.start, found.end, strict=True)) == expected


@pytest.mark.parametrize("bad", [5, 6, 7], ids=["nan", "inf", "length overflows"])
def test_rows_that_are_not_finite_are_told_apart(bad: int) -> None:
    cosines, finite = score(([1, bad, 3], "uua"), ([1, 2, 3, 3], "uuaa"))
    np.testing.assert_array_equal(finite, [False, True])
    assert (cosines.low[0] == ABSENT).all()
    np.testing.assert_array_equal(cosines.low[1, :3], steps(0, -1, 0))
    assert segments(([1, bad, 3], "uua"), ([1, 3], "ua"))[0].row.tolist() == [1, 1]


def test_a_residual_of_zero_is_at_right_angles_to_everything() -> None:
    cosines, finite = score(([4], "u"))
    assert finite.all()
    np.testing.assert_array_equal(cosines.low[0, :3], [0, 0, 0])


def test_nothing_to_score() -> None:
    for rows in ([], [([], "")], [([], ""), ([], "")]):
        found, finite = segments(*rows)
        assert found.conversations == len(rows)
        assert found.low.shape == found.high_at.shape == (0, 3)
        assert finite.shape == (len(rows),)
    cosines, finite = score(([], ""), ([1], "u"))
    assert finite.all()
    np.testing.assert_array_equal(cosines.high[:, 0], [ABSENT, *steps(0.6)])


ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from("ua")), max_size=8), max_size=6
)


def assert_batch_does_not_matter(scorer: Any, rows: list[Any]) -> None:
    parts = [([i for i, _ in row], "".join(w for _, w in row)) for row in rows]
    together, _ = segments(*parts, scorer=scorer)
    for row, part in enumerate(parts):
        alone, _ = segments(part, scorer=scorer)
        for mine, theirs in zip(astuple(together.take([row])), astuple(alone), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@given(ROWS)
def test_padding_and_neighbours_do_not_matter(rows: list[Any]) -> None:
    assert_batch_does_not_matter(EXACT, rows)


def test_a_batch_in_one_chunk_needs_no_cache() -> None:
    trunk = Lookup(TABLE, 3)
    score(([1], "u"), ([1, 2], "ua"), scorer=Scorer(trunk, made_of(AXES, [0, 1, 2])))
    assert trunk.options == {"past_key_values": None, "use_cache": False}


def test_places_in_a_row_longer_than_the_reduction_looks_at_together() -> None:
    assert PIECE % 64 == 0
    ids = np.full(2 * PIECE + 100, 4, np.int32)
    ids[[PIECE - 1, 2 * PIECE, 2 * PIECE + 50]] = [3, 2, 1]
    roles = (np.arange(len(ids)) >= 2 * PIECE + 50).astype(np.int8)
    found, finite = Scorer(Lookup(TABLE, 3), made_of(AXES, [0, 0, 2]), 10**6).score(
        [ids, ids[:5]], [roles, roles[:5]]
    )
    cosines = whole(found)
    assert finite.all()
    np.testing.assert_array_equal(cosines.high[0], steps(0.5, 0.5, 0.5) + steps(0.6, 0, 0))
    np.testing.assert_array_equal(cosines.low[0], steps(0, -1, 0) + steps(0, 0, 0))
    first = 2 * PIECE + 50
    np.testing.assert_array_equal(cosines.high_at[0], [PIECE - 1] * 3 + [first] * 3)
    np.testing.assert_array_equal(cosines.low_at[0], [0, 2 * PIECE, 0, first + 1, first, first])
    assert (cosines.low[1, 3:] == ABSENT).all()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


def test_the_reduction_makes_nothing_larger_than_a_number_per_token_and_direction() -> None:
    rows, tokens, k = 3, 512, 40
    reduction = Reduction(cut([np.zeros(tokens, np.int8)] * rows), rows, torch.device("cpu"))
    hidden, directions = torch.randn(rows, tokens, 16), torch.randn(k, 16)
    with Largest() as largest:
        reduction.begin(torch.zeros(rows, tokens, dtype=torch.bool), 0)
        reduction.add(0, hidden, directions)
    assert largest.bytes == 4 * rows * tokens * k


def test_short_segments_are_laid_side_by_side_in_parts() -> None:
    """A segment of one token takes the place of 64."""
    tokens, k = 4 * TOGETHER, 3
    roles = (np.arange(tokens) % 2).astype(np.int8)
    reduction = Reduction(cut([roles]), 1, torch.device("cpu"))
    hidden, directions = torch.randn(1, tokens, 16), torch.eye(k, 16)
    with Largest() as largest:
        reduction.begin(torch.zeros(1, tokens, dtype=torch.bool), 0)
        reduction.add(0, hidden, directions)
    assert largest.bytes == max(8 * tokens * 64, 4 * TOGETHER * 64 * k)
    found, _ = reduction.result()
    cosines = hidden[0] @ directions.T / hidden[0].norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(found.low * STEP, cosines.numpy(), atol=STEP)
    np.testing.assert_array_equal(found.low, found.high)


def test_hooks_are_gone_even_when_the_model_fails() -> None:
    trunk = Lookup(TABLE, 3)
    scorer = Scorer(trunk, made_of(AXES, [0, 1, 2]))
    with pytest.raises(IndexError):
        score(([99], "u"), scorer=scorer)
    score(([1], "u"), scorer=scorer)
    assert not any(layer._forward_hooks for layer in trunk.layers)


def test_directions_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        Scorer(Lookup(TABLE, 3), made_of(AXES, [1, 0, 2]))


def test_threads_may_share_a_scorer() -> None:
    expected = {count: segments(([1, 2] * count, "ua" * count))[0].high for count in range(1, 9)}
    wrong: list[int] = []

    def work(count: int) -> None:
        for _ in range(20):
            if (segments(([1, 2] * count, "ua" * count))[0].high != expected[count]).any():
                wrong.append(count)

    threads = [threading.Thread(target=work, args=[count]) for count in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_scorer_can_be_held_weakly() -> None:
    assert weakref.ref(EXACT)() is EXACT


# --- the stand-in for tests of everything else --------------------------------------------------


@given(ROWS)
def test_the_cheap_scorer_is_one_number_per_conversation(rows: list[Any]) -> None:
    assert_batch_does_not_matter(CheapScorer(3, seed=1), rows)


def test_the_cheap_scorer_looks_like_the_real_one() -> None:
    ids = [np.arange(40, dtype=np.int32) + row for row in range(200)]
    roles = [(np.arange(40) >= 15).astype(np.int8)] * 200
    found, finite = CheapScorer(50, seed=1).score(ids, roles)
    assert finite.all()
    assert (found.low <= found.high).all()
    assert np.abs(np.concatenate([found.low, found.high]).std() * STEP - 0.04) < 0.001
    assert found.low_at[found.role == 0].max() == 14
    assert found.start[found.role == 1].min() == 15
    assert (CheapScorer(50, seed=2).score(ids, roles)[0].low != found.low).mean() > 0.99
