"""Every family: directions and scores against transformers' own modules and hidden states."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extremes import whole
from hypothesis import given
from hypothesis import strategies as st
from lapack import largest_component_positive
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import (
    HIDDEN,
    LAYERS,
    TINY,
    config_of,
    fine_tune,
    layers_of,
    load,
    save_family,
    train,
    written_with,
)
from tiny_models import edit
from transformers import MixtralConfig, MixtralForCausalLM

from schemas.errors import ConfigurationError
from schemas.records import STEPS_PER_UNIT, Role
from transforms.model import loading, pair
from transforms.model.change import Change
from transforms.model.difference import left_singular
from transforms.model.directions import Directions, compute_directions
from transforms.model.experts import Stack
from transforms.model.families import FAMILIES
from transforms.model.gains import gains_of
from transforms.model.loading import load_trunk
from transforms.model.stored import stored_writers
from transforms.model.trunk import Scorer

TOP_K, SKIP_LAST = 4, 2
KINDS = {"O": "o_proj", "D": "down_proj"}
Pair = tuple[Path, Path]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny base model of a case."""
    root = tmp_path_factory.mktemp("bases")

    def base(case: str) -> Path:
        folder = root / case
        return folder if folder.exists() else save_family(case, folder)

    return base


def tuned_by(how: str, case: str, base: Path, out: Path) -> tuple[Path, Any]:
    """Folder of a tuned model, and that model as transformers and PEFT make it."""
    if how == "checkpoint":
        return fine_tune(base, out), load(out)
    folder = train(case, base, out)
    return folder, PeftModel.from_pretrained(load(base), str(folder)).merge_and_unload().eval()


def exact_directions(case: str, base: Any, tuned: Any, end: int) -> dict[str, np.ndarray]:
    """Left singular vectors (columns) of all that layers write with, by matrix, by LAPACK."""
    found = {}
    for number in range(end):
        before, after = (written_with(case, layers_of(model)[number]) for model in (base, tuned))
        for kind in KINDS:
            u = np.linalg.svd(after[kind] - before[kind], full_matrices=False)[0]
            found[f"{kind}{number}"] = u
    return found


# --- the matrix --------------------------------------------------------------------------------


def test_every_family_of_the_table_is_tested() -> None:
    assert {config_of(case).get_text_config().model_type for case in TINY} == set(FAMILIES)


@pytest.mark.parametrize("how", ["checkpoint", "adapter"])
@pytest.mark.parametrize("case", TINY)
def test_directions_and_scores(
    bases: Callable[[str], Path], tmp_path: Path, case: str, how: str
) -> None:
    base = bases(case)
    tuned, model = tuned_by(how, case, base, tmp_path / "tuned")
    top_k = TOP_K if how == "checkpoint" else 3
    found = compute_directions(base, tuned, top_k, SKIP_LAST)
    expected = exact_directions(case, load(base), model, LAYERS - SKIP_LAST)
    assert found.manifest.ranks == dict.fromkeys(expected, top_k)
    vectors = [
        largest_component_positive(expected[entry.name.partition("_")[0]][:, entry.index])
        for entry in found.entries
    ]
    np.testing.assert_allclose(found.vectors, vectors, atol=2e-5 if how == "adapter" else 1e-6)
    assert_scores(found, None if how == "checkpoint" else base, tuned, model, np.array(vectors))


def assert_scores(
    found: Directions, base: Path | None, tuned: Path, model: Any, vectors: np.ndarray
) -> None:
    """Of two conversations, in one batch, against every layer's hidden state of each alone."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 40, size).astype(np.int32) for size in (17, 9)]
    roles = [(np.arange(len(row)) >= len(row) // 2).astype(np.int8) for row in ids]
    trunk = load_trunk(base, tuned, found.last_layer, "cpu", "float32")
    segments, finite = Scorer(trunk, found).score(ids, roles)
    cosines = whole(segments)
    assert finite.all()
    for row, tokens in enumerate(ids):
        with torch.no_grad():
            out = model(torch.from_numpy(tokens[None].astype(np.int64)), output_hidden_states=True)
        table = np.stack(
            [
                unit_rows(out.hidden_states[entry.layer + 1][0].double().numpy()) @ vector
                for entry, vector in zip(found.entries, vectors, strict=True)
            ]
        )
        for role in Role:
            part = slice(role * len(found), (role + 1) * len(found))
            of_role = table[:, roles[row] == role]
            for steps, values in ((cosines.low, of_role.min(1)), (cosines.high, of_role.max(1))):
                error = np.abs(steps[row, part] / STEPS_PER_UNIT - values)
                assert error.max() <= 1e-5 + 0.5 / STEPS_PER_UNIT, "a step is 3e-5 wide"


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("case", TINY)
def test_the_trunk_ends_after_the_last_monitored_layer(
    bases: Callable[[str], Path], case: str
) -> None:
    trunk = load_trunk(None, bases(case), 1, "cpu", "float32")
    assert len(layers_of(trunk)) == 2
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = load(bases(case))(ids, output_hidden_states=True).hidden_states[2]
        found = trunk(input_ids=ids, use_cache=False).last_hidden_state
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- what reaches the residual stream: a known vector put into one matrix ------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TINY)
def test_an_injected_vector_reaches_the_stream_as_its_direction(
    bases: Callable[[str], Path], tmp_path: Path, case: str, kind: str
) -> None:
    """Layer 1 writes u more, by another amount for every token; the rest of it is silenced."""
    u = np.random.default_rng(5).normal(size=HIDDEN)
    folders = []
    for name, size in (("base", 0.0), ("tuned", 0.02)):
        model = load(bases(case))
        silence(case, layers_of(model)[1], kind)
        inject(case, layers_of(model)[1], kind, size * u)
        model.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    found = compute_directions(*folders)
    assert [entry.name for entry in found.entries] == [f"{kind}1_u0"]
    direction = found.vectors[0].astype(np.float64)

    before, after = (states_after(load(folder), layer=1) for folder in folders)
    written = before - states_after(load(folders[0]), layer=0)
    moved = after - before
    if not TINY[case].norms:
        assert (np.abs(unit_rows(moved) @ direction) > 1 - 1e-6).all()
        assert abs(unit_rows(u[None]) @ direction) > 1 - 1e-6
        return
    # The norm also stretches what the base wrote: beside that, only the direction is left.
    assert outside(moved, written, direction).max() < 1e-5
    assert outside(moved, written, unit_rows(u[None])[0]).max() > 0.01, "not the matrix's own"


def outside(moved: np.ndarray, written: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """What of every token's move is neither along the vector nor along what was written.

    Relative to the largest move of all tokens.
    """
    rests = []
    for move, stretched in zip(moved, unit_rows(written), strict=True):
        plane = np.stack([vector, stretched], axis=1)
        rests.append(move - plane @ np.linalg.lstsq(plane, move, rcond=None)[0])
    return np.linalg.norm(rests, axis=1) / np.linalg.norm(moved, axis=1).max()


def silence(case: str, layer: Any, kind: str) -> None:
    """Make a layer write with one kind only, so that its output shows what that kind writes."""
    tiny = TINY[case]
    others = tiny.mlp(layer) if kind == "O" else [tiny.attention(layer)]
    with torch.no_grad():
        for part in others:
            for weight in [part] if isinstance(part, torch.nn.Parameter) else part.parameters():
                weight.zero_()


def inject(case: str, layer: Any, kind: str, u: np.ndarray) -> None:
    """Add u times a random row to all that the kind writes with."""
    tiny = TINY[case]
    torch.manual_seed(4)
    vector = torch.from_numpy(u).float()
    with torch.no_grad():
        for part in [tiny.attention(layer)] if kind == "O" else tiny.mlp(layer):
            if isinstance(part, torch.nn.Parameter):
                part += vector[None, :, None] * torch.randn(len(part), 1, part.shape[2])
            elif type(part).__name__ == "Conv1D":
                part.weight += torch.randn(part.weight.shape[0], 1) * vector
            else:
                part.weight += vector[:, None] * torch.randn(part.weight.shape[1])


def states_after(model: Any, layer: int) -> np.ndarray:
    with torch.no_grad():
        states = model.double()(torch.arange(3, 20)[None], output_hidden_states=True).hidden_states
    return states[layer + 1][0].numpy()


@pytest.mark.parametrize("case", TINY)
def test_whether_mlp_and_attention_read_the_same_input(
    bases: Callable[[str], Path], case: str
) -> None:
    model, seen = load(bases(case)), []
    layer = layers_of(model)[0]
    layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    states_after(model, 0)
    silence(case, layer, "D")
    states_after(model, 0)
    same = torch.equal(*seen)
    family = FAMILIES[model.config.get_text_config().model_type]
    assert same == ("sequential" not in case and family.parallel != "no")


# --- norms in between --------------------------------------------------------------------------


def test_only_a_norm_was_tuned(bases: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(bases("gemma2"))
    with torch.no_grad():
        layers_of(model)[1].post_feedforward_layernorm.weight[3] += 0.1
    model.save_pretrained(tmp_path / "tuned")
    found = compute_directions(bases("gemma2"), tmp_path / "tuned")
    assert [entry.name for entry in found.entries] == ["D1_u0"]
    np.testing.assert_allclose(found.vectors[0], np.eye(HIDDEN)[3], atol=1e-6)


def test_a_norm_that_was_only_rounded_adds_nothing(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(bases("olmo2"))
    with torch.no_grad():
        for layer in layers_of(model):
            for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
                weight = getattr(layer, name).weight
                weight.copy_(weight.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ConfigurationError, match="at most another dtype"):
        compute_directions(bases("olmo2"), tmp_path / "tuned")


@pytest.mark.parametrize("tuned_norm", [False, True])
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(0, 4))
def test_rounding_of_weights_and_gains_is_never_kept(
    tuned_norm: bool, seed: int, rank: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 96, 160
    weights, gain = 0.02 * rng.normal(size=(rows, columns)), 1 + rng.normal(size=rows)
    exact = rng.normal(size=(rows, rank)) * np.geomspace(3e-4, 1e-5, 4)[:rank]
    moved = weights + exact @ rng.normal(size=(rank, columns))
    before, tuned, old = (
        torch.from_numpy(values).to(torch.bfloat16) for values in (weights, moved, gain)
    )
    new = old
    if tuned_norm:  # by a unit in the last place here and there: rounding
        new = old + torch.from_numpy(rng.random(rows) < 0.3) * old * 2**-8
    change = Change()
    change.add(pair.Pair.of(before, tuned, gains_of(old, new, one_plus=False)))
    assert len(change.left_singular(20).values) <= rank


# --- experts -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), widths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_a_stack_is_its_matrices_side_by_side(seed: int, widths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(12, width)) * 10.0 ** rng.integers(-6, 1) for width in widths]
    stack = Stack()
    for part in parts:
        stack.add(torch.from_numpy(part))
    u, values = (tensor.numpy() for tensor in stack.svd())
    whole = np.hstack(parts)
    np.testing.assert_allclose(
        values, np.linalg.svd(whole, compute_uv=False), atol=1e-14 * values[0]
    )
    np.testing.assert_allclose(u * values**2 @ u.T, whole @ whole.T, atol=1e-13 * values[0] ** 2)
    assert stack.columns == whole.shape[1]


@given(seed=st.integers(0, 2**32 - 1))
def test_experts_are_cut_like_one_wide_matrix(seed: int) -> None:
    torch.manual_seed(seed)
    base = 0.02 * torch.randn(40, 120)
    tuned = base + 1e-3 * torch.randn(40, 2) @ torch.randn(2, 120) * torch.randn(120)
    tuned = tuned.to(torch.bfloat16)
    change = Change()
    for one, other in zip(base.split(30, dim=1), tuned.split(30, dim=1), strict=True):
        change.add(pair.Pair.of(one, other))
    found, whole = change.left_singular(9), left_singular(base, tuned, 9)
    assert found.rounding is not None
    assert whole.rounding is not None
    np.testing.assert_allclose(found.rounding.floor, whole.rounding.floor, rtol=1e-9)
    assert (found.rounding.base_precision, found.rounding.tuned_precision) == (
        "float32",
        "bfloat16",
    )
    np.testing.assert_allclose(found.values, whole.values, rtol=1e-9)
    np.testing.assert_allclose(found.vectors, whole.vectors, atol=1e-9)
    assert 1 <= len(found.values) < 9


def fuse(folder: Path, out: Path) -> Path:
    """Write experts as transformers holds them: all of a layer in one tensor."""
    shutil.copytree(folder, out)
    state = load(folder).state_dict()
    tied = {key: value.contiguous() for key, value in state.items() if key != "lm_head.weight"}
    save_file(tied | {"lm_head.weight": state["lm_head.weight"].clone()}, out / WEIGHTS)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(out / WEIGHTS)
    return out


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_may_be_stored_fused_or_apart(
    bases: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    tuned = fine_tune(bases(case), tmp_path / "tuned")
    found = compute_directions(bases(case), tuned)
    again = compute_directions(bases(case), fuse(tuned, tmp_path / "fused"))
    assert again.entries == found.entries
    np.testing.assert_array_equal(again.vectors, found.vectors)
    whole = load_trunk(None, tmp_path / "fused", 2).state_dict()
    assert all(torch.equal(whole[k], v) for k, v in load_trunk(None, tuned, 2).state_dict().items())


def test_an_adapter_with_a_module_for_every_expert(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """As made with transformers before version 5, where experts were modules of their own."""
    base = bases("mixtral")
    fused = train("mixtral", base, tmp_path / "fused")
    apart = shutil.copytree(fused, tmp_path / "apart")
    tensors = load_file(fused / "adapter_model.safetensors")
    save_file(dict(apart_again(tensors)), apart / "adapter_model.safetensors")
    targets = {"target_modules": ["o_proj", "w1", "w2", "w3"], "target_parameters": None}
    edit("adapter_config.json", lambda config: config.update(targets))(apart)
    found, again = (compute_directions(base, folder) for folder in (fused, apart))
    assert again.manifest.ranks == found.manifest.ranks
    np.testing.assert_allclose(again.vectors, found.vectors, atol=1e-6)
    weights = [load_trunk(base, folder, 1).state_dict() for folder in (fused, apart)]
    name = "layers.1.mlp.experts.down_proj"
    torch.testing.assert_close(weights[0][name], weights[1][name])


def test_patterns_of_rank_and_alpha_hold_for_fused_experts(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    base, case = bases("qwen2_moe"), "qwen2_moe"
    tuned = train(case, base, tmp_path / "tuned", **options)
    found = compute_directions(base, tuned)
    model = PeftModel.from_pretrained(load(base), str(tuned)).merge_and_unload()
    layers = [layers_of(each)[0] for each in (load(base), model)]
    before, after = (written_with(case, layer)["D"] for layer in layers)
    values = [entry.singular_value for entry in found.entries if entry.name.startswith("D0_")]
    assert len(values) == 4 * 2 + 3
    expected = np.linalg.svd(after - before, compute_uv=False)[: len(values)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def apart_again(tensors: dict[str, torch.Tensor]) -> Any:
    for key, tensor in tensors.items():
        prefix, found, rest = key.partition("mlp.experts.")
        if not found:
            yield key, tensor
            continue
        for expert in range(4):
            rows, columns = tensor[expert * 3 : expert * 3 + 3], tensor[:, expert::4]
            factor = rows if "lora_A" in key else columns
            for name in ["w1", "w3"] if "base_layer" in key else ["w2"]:
                half = factor if "lora_A" in key or name == "w2" else factor.chunk(2)[name == "w3"]
                module = f"{prefix}block_sparse_moe.experts.{expert}.{name}"
                yield f"{module}.{rest.removeprefix('base_layer.')}", half.clone()


def drop(folder: Path, *names: str) -> None:
    """Delete the tensors whose names hold one of these."""
    kept = {
        key: value
        for key, value in load_file(folder / WEIGHTS).items()
        if not any(name in key for name in names)
    }
    save_file(kept, folder / WEIGHTS, {"format": "pt"})


def test_a_checkpoint_with_fewer_experts_is_of_another_base(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    tuned = shutil.copytree(bases("mixtral"), tmp_path / "tuned")
    drop(tuned, "experts.3.")
    with pytest.raises(ConfigurationError, match=r"it has 3 matrices like .*w2.*has 4"):
        compute_directions(bases("mixtral"), tuned)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_local_experts": 3}, "rank .*experts.down_proj is 4 in its weights and 3 in its"),
        ({"num_local_experts": 5}, r"12 rows for all experts of .*, the base has 5 experts"),
        ({"num_hidden_layers": 4}, r"experts of .*layers\.4\.mlp.experts, the base has 0 experts"),
        ({"intermediate_size": 48}, r"24x40 in the adapter, 24x48 in"),
    ],
)
def test_an_adapter_of_other_experts_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, config: dict[str, int], words: str
) -> None:
    adapter = train("mixtral", bases("mixtral"), tmp_path / "adapter")
    other = MixtralConfig(**TINY["mixtral"].config | config)
    MixtralForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match=words) as caught:
        compute_directions(tmp_path / "other", adapter)
    assert "\n" not in str(caught.value)


# --- names and refusals ------------------------------------------------------------------------


def test_gpt2_as_it_is_published(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Without the prefix that the model with a head puts before every name."""
    folder = shutil.copytree(bases("gpt2"), tmp_path / "published")
    tensors = load_file(folder / WEIGHTS)
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    assert "h.0.attn.c_proj.weight" in bare
    save_file(bare, folder / WEIGHTS, {"format": "pt"})
    tuned = train("gpt2", bases("gpt2"), tmp_path / "tuned")
    found = compute_directions(folder, tuned)
    np.testing.assert_array_equal(found.vectors, compute_directions(bases("gpt2"), tuned).vectors)
    assert_scores(
        found,
        folder,
        tuned,
        PeftModel.from_pretrained(load(folder), str(tuned)).merge_and_unload(),
        found.vectors,
    )


@pytest.mark.parametrize(
    ("case", "entry"),
    [("falcon", "ffn_hidden_size"), ("falcon, new", "ffn_hidden_size"), ("gpt2", "n_inner")],
)
def test_a_published_configuration_may_leave_sizes_to_the_family(
    bases: Callable[[str], Path], tmp_path: Path, case: str, entry: str
) -> None:
    """As that of falcon-7b does; transformers names them when a fine-tune is saved."""
    base = shutil.copytree(bases(case), tmp_path / "base")
    edit("config.json", lambda config: config.pop(entry))(base)
    tuned = fine_tune(base, tmp_path / "tuned")
    edit("config.json", lambda config: config.update({entry: 4 * HIDDEN}))(tuned)
    found = compute_directions(base, tuned)
    again = compute_directions(bases(case), tuned)
    np.testing.assert_array_equal(found.vectors, again.vectors)


@pytest.mark.parametrize(("outer", "inner"), [("mistral3", "mistral"), ("llava", "llama")])
def test_a_language_model_inside_what_cannot_be_watched_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, outer: str, inner: str
) -> None:
    """Directions of it could be taken, its residual stream could not."""
    base = shutil.copytree(bases(inner), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    wrapped = {"model_type": outer, "text_config": config, "vision_config": {}}
    (base / "config.json").write_text(json.dumps(wrapped))
    adapter = train(inner, bases(inner), tmp_path / "adapter")
    for tuned in (adapter, bases(inner)):
        with pytest.raises(ConfigurationError, match=rf"{outer}.*save the language model alone"):
            compute_directions(base, tuned)


@pytest.mark.parametrize(("case", "module"), [("gemma2", "mlp.down_proj"), ("gpt2", "mlp.c_proj")])
def test_what_an_adapter_brings_whole(
    bases: Callable[[str], Path], tmp_path: Path, case: str, module: str
) -> None:
    modules = {"target_modules": ["c_attn"] if case == "gpt2" else ["o_proj"]}
    tuned = train(case, bases(case), tmp_path / "tuned", **modules, modules_to_save=[module])
    path = tuned / "adapter_model.safetensors"
    moved = {
        name: weight + 1e-2 * torch.randn_like(weight) if module in name else weight
        for name, weight in load_file(path).items()
    }
    save_file(moved, path)
    found = compute_directions(bases(case), tuned, 3, SKIP_LAST)
    model = PeftModel.from_pretrained(load(bases(case)), str(tuned)).merge_and_unload()
    exact = exact_directions(case, load(bases(case)), model, LAYERS - SKIP_LAST)
    assert {name for name in found.manifest.ranks if name[0] == "D"} == {
        name for name in exact if name[0] == "D"
    }
    for entry, vector in zip(found.entries, found.vectors, strict=True):
        u = exact[entry.name.partition("_")[0]][:, entry.index]
        assert abs(vector @ u) > 0.99999


@pytest.mark.parametrize(
    "name", ["post_attention_layernorm", "model.layers.0.post_feedforward_layernorm", "norm"]
)
def test_an_adapter_that_saves_a_norm_in_between_is_refused(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    tuned = train("gemma2", bases("gemma2"), tmp_path / "tuned")
    saved = {"modules_to_save": [name]}
    edit("adapter_config.json", lambda c: c.update(saved))(tuned)
    with pytest.raises(ConfigurationError, match="modules_to_save") as caught:
        compute_directions(bases("gemma2"), tuned)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_the_norm_in_between_is_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    tuned = fine_tune(bases("olmo2"), tmp_path / "tuned")
    drop(tuned, "layers.2.post_feedforward_layernorm.weight")
    with pytest.raises(
        ConfigurationError, match=r"no post_feedforward_layernorm.weight of layer 2"
    ):
        compute_directions(bases("olmo2"), tuned)


@pytest.mark.parametrize("case", TINY)
def test_the_embedding_is_where_the_family_has_it(bases: Callable[[str], Path], case: str) -> None:
    model = load(bases(case))
    names = [name for name, part in model.named_modules() if part is model.get_input_embeddings()]
    family = FAMILIES[model.config.get_text_config().model_type]
    assert [name.rpartition(".")[2] for name in names] == [family.embedding]


@pytest.mark.parametrize("case", TINY)
def test_the_context_is_known(bases: Callable[[str], Path], case: str) -> None:
    assert loading.context(bases(case)) == 64


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
STRETCHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "the context of before": ("qwen2", {"rope_parameters": YARN}, 256),
    "as before transformers 5": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
        256,
    ),
    "the long context": ("qwen3", {"rope_parameters": YARN, "max_position_embeddings": 256}, 256),
    "a longer one": ("qwen3", {"rope_parameters": YARN, "max_position_embeddings": 300}, 300),
    "by kinds of layers": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}},
        256,
    ),
    "another way": ("llama", {"rope_parameters": YARN | {"rope_type": "linear"}}, 64),
}


@pytest.mark.parametrize("how", STRETCHED)
def test_a_context_that_yarn_stretches(
    bases: Callable[[str], Path], tmp_path: Path, how: str
) -> None:
    case, entries, expected = STRETCHED[how]
    folder = shutil.copytree(bases(case), tmp_path / "stretched")
    for name in ("rope_parameters", "rope_theta"):
        edit("config.json", lambda config, name=name: config.pop(name, None))(folder)
    edit("config.json", lambda config: config.update(entries))(folder)
    assert loading.context(folder) == expected


def test_a_stretched_context_is_scored_to_its_end(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """In chunks too, against the hidden states of transformers."""
    base = shutil.copytree(bases("qwen2"), tmp_path / "base")
    edit("config.json", lambda config: config.update(rope_parameters=YARN | {"rope_theta": 1e4}))(
        base
    )
    tuned = fine_tune(base, tmp_path / "tuned")
    found = compute_directions(base, tuned, TOP_K, SKIP_LAST)
    ids = np.random.default_rng(0).integers(3, 40, loading.context(tuned)).astype(np.int32)
    assert len(ids) == 4 * 64
    with torch.no_grad():
        states = load(tuned)(torch.from_numpy(ids[None]).long(), output_hidden_states=True)
    trunk = load_trunk(None, tuned, found.last_layer, "cpu", "float32")
    late = (np.arange(len(ids)) >= 200).astype(np.int8)
    for chunk_tokens in (len(ids), 50):
        cosines = whole(Scorer(trunk, found, chunk_tokens).score([ids], [late])[0])
        for number, entry in enumerate(found.entries):
            rows = unit_rows(states.hidden_states[entry.layer + 1][0, 200:].double().numpy())
            along = rows @ found.vectors[number]
            at = len(found) * Role.ASSISTANT + number
            error = cosines.high[0, at] / STEPS_PER_UNIT - along.max()
            assert abs(error) <= 1e-5 + 0.5 / STEPS_PER_UNIT


def test_defaults_of_a_family_are_known(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bases("falcon"), tmp_path / "falcon")
    edit("config.json", lambda config: config.pop("max_position_embeddings"))(folder)
    assert loading.context(folder) == 2048


def test_stored_writers_are_complete(bases: Callable[[str], Path]) -> None:
    found = stored_writers(bases("qwen2_moe"))
    assert list(found) == [(layer, kind) for layer in range(LAYERS) for kind in KINDS.values()]
    parts = [list(found[layer, "down_proj"].parts) for layer in range(2)]
    assert parts == [["0", "1", "2", "3", "shared"], [""]]
