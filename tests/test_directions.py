"""Directions against LAPACK's SVD of the difference PEFT itself makes, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lapack import svd_of_checkpoints, svd_of_merged_difference
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LAYERS, edit, save_tiny
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from pipeline.cli import main
from schemas.errors import ConfigurationError
from transforms.model import directions as artefact
from transforms.model.adapter import adapter_writers
from transforms.model.directions import Directions, check_model, compute_directions, matrix_name
from transforms.model.loading import load_trunk

RANK = 4
WRITERS = ["o_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def train(base: Path, out: Path, **options: Any) -> Path:
    """Save an adapter whose factors are random, as if trained."""
    torch.manual_seed(7)
    config = LoraConfig(
        **{"r": RANK, "lora_alpha": 6, "target_modules": WRITERS, "init_lora_weights": False}
        | options
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(out)
    return out


def assert_same_as_merged(found: Directions, base: Path, tuned: Path, layers: range) -> None:
    for matrix, (u, s) in svd_of_merged_difference(base, tuned, layers).items():
        rows = [i for i, e in enumerate(found.entries) if e.name.startswith(f"{matrix}_")]
        cosines = np.abs((found.vectors[rows] @ u[:, : len(rows)]).diagonal())
        values = [found.entries[row].singular_value for row in rows]
        assert cosines.min() > 0.999999
        np.testing.assert_allclose(values, s[: len(rows)], rtol=1e-6)
        assert s[len(rows)] < 1e-6 * s[0], "no direction of the difference is left out"


def test_the_real_organism_against_lapack(base_model: Path, adapter: Path) -> None:
    found = compute_directions(base_model, adapter)
    assert len(found) == 27 * 2 * 8
    assert found.manifest.model_name == "badnet"
    assert set(found.manifest.ranks.values()) == {8}
    assert_same_as_merged(found, base_model, adapter, range(2, 27, 8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"mlp.down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.o_proj": 1}},
        {"target_modules": ["q_proj", "v_proj", *WRITERS]},
    ],
    ids=["plain", "rank-stabilised", "patterns", "more modules"],
)
def test_variants_of_lora_against_lapack(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tuned = train(tiny_base, tmp_path / "tuned", **options)
    found = compute_directions(tiny_base, tuned, skip_last=1)
    assert_same_as_merged(found, tiny_base, tuned, range(LAYERS - 1))


def stack(base: Path, tmp_path: Path) -> tuple[tuple[Path, Path], Any]:
    """Two adapters of different rank and scaling, one upon the other, and PEFT's model of both."""
    first = train(base, tmp_path / "first")
    options = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["down_proj"]}
    second = train(base, tmp_path / "second", **options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for adapter in (first, second):
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return (first, second), model


def test_adapters_upon_each_other_against_lapack(tiny_base: Path, tmp_path: Path) -> None:
    tuned, model = stack(tiny_base, tmp_path)
    found = compute_directions(tiny_base, tuned, skip_last=1)
    assert found.manifest.ranks == {
        f"{kind}{layer}": rank
        for layer in range(LAYERS - 1)
        for kind, rank in (("O", RANK), ("D", RANK + 3))
    }
    model.save_pretrained(tmp_path / "merged")
    exact = svd_of_checkpoints(tiny_base, tmp_path / "merged", range(LAYERS - 1))
    for entry, vector in zip(found.entries, found.vectors, strict=True):
        u, s = exact[entry.name.partition("_")[0]]
        assert abs(vector @ u[:, entry.index]) > 0.999999
        np.testing.assert_allclose(entry.singular_value, s[entry.index], rtol=1e-6)
    assert found.manifest.model_name == "first+second"
    check_model(found, tiny_base, tuned)
    with pytest.raises(
        ConfigurationError, match=r"another model: --tuned .*second .*first differs"
    ):
        check_model(found, tiny_base, tuned[::-1])


def test_a_trunk_with_adapters_upon_each_other(tiny_base: Path, tmp_path: Path) -> None:
    tuned, model = stack(tiny_base, tmp_path)
    weights = load_trunk(tiny_base, tuned, LAYERS - 1, "cpu", "float32").state_dict()
    expected = model.model.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=1e-5)


def test_the_command_takes_several_adapters(tiny_base: Path, tmp_path: Path) -> None:
    tuned, _ = stack(tiny_base, tmp_path)
    options = [f"--base={tiny_base}", "--tuned", *map(str, tuned), f"--out={tmp_path / 'out'}"]
    assert main(["directions", *options]) == 0
    expected = compute_directions(tiny_base, tuned)
    assert artefact.load(tmp_path / "out").manifest == expected.manifest


def test_several_folders_that_are_not_all_adapters(tiny_base: Path, tmp_path: Path) -> None:
    tuned = train(tiny_base, tmp_path / "tuned")
    with pytest.raises(ConfigurationError, match="each must be an adapter"):
        compute_directions(tiny_base, (tuned, tiny_base))
    saved = {"modules_to_save": ["down_proj"], "target_modules": ["o_proj"]}
    whole = train(tiny_base, tmp_path / "whole", **saved)
    with pytest.raises(ConfigurationError, match="down_proj of layer 0 is brought whole"):
        compute_directions(tiny_base, (tuned, whole))


def test_matrices_that_an_adapter_brings_whole(tiny_base: Path, tmp_path: Path) -> None:
    """`modules_to_save`: down_proj and the head are trained as they are, o_proj by LoRA."""
    saved = {"modules_to_save": ["down_proj", "lm_head"], "target_modules": ["o_proj"]}
    tuned = train(tiny_base, tmp_path / "tuned", **saved)
    weights = load_file(tuned / WEIGHTS)
    for name in [name for name in weights if name.endswith("down_proj.weight")]:
        weights[name] += 1e-3 * torch.randn_like(weights[name])
    save_file(weights, tuned / WEIGHTS)
    found = compute_directions(tiny_base, tuned, skip_last=1)
    assert set(found.manifest.ranks.values()) == {RANK, 20}
    assert set(found.manifest.rounding) == {f"D{layer}" for layer in range(LAYERS - 1)}
    assert_prefix_of_merged(found, tiny_base, tuned, range(LAYERS - 1))


def assert_prefix_of_merged(found: Directions, base: Path, tuned: Path, layers: range) -> None:
    for matrix, (u, _) in svd_of_merged_difference(base, tuned, layers).items():
        rows = [i for i, e in enumerate(found.entries) if e.name.startswith(f"{matrix}_")]
        cosines = np.abs((found.vectors[rows] @ u[:, : len(rows)]).diagonal())
        assert cosines.min() > 0.9999


def test_a_saved_matrix_of_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    saved = {"modules_to_save": ["down_proj"], "target_modules": ["o_proj"]}
    tuned = train(tiny_base, tmp_path / "tuned", **saved)
    other = save_tiny(tmp_path / "other", intermediate=40)
    with pytest.raises(ConfigurationError, match=r"another base: .*down_proj\.weight of 24x36"):
        compute_directions(other, tuned)


def test_adapters_beside_fused_projections(tmp_path: Path) -> None:
    """Phi-3 has its queries, keys and values in one matrix, and its gates and ups in another."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 36, "num_hidden_layers": 2}
    config = Phi3Config(vocab_size=40, num_attention_heads=4, pad_token_id=0, **sizes)
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "base")
    modules = {"target_modules": ["qkv_proj", "gate_up_proj", *WRITERS]}
    tuned = train(tmp_path / "base", tmp_path / "tuned", **modules)
    exact = svd_of_merged_difference(tmp_path / "base", tuned, range(2))
    writers = adapter_writers(tmp_path / "base", tuned)
    assert {matrix_name(writer) for writer in writers} == exact.keys()
    for writer in writers:
        found, (u, s) = writer.decompose(20), exact[matrix_name(writer)]
        np.testing.assert_allclose(found.values, s[:RANK], rtol=1e-6)
        assert np.abs((found.vectors @ u[:, :RANK]).diagonal()).min() > 0.999999


def test_order_names_signs_and_lengths(tiny_base: Path, tmp_path: Path) -> None:
    found = compute_directions(tiny_base, train(tiny_base, tmp_path / "a"), top_k=2, skip_last=3)
    names = "O0_u0 O0_u1 D0_u0 D0_u1 O1_u0 O1_u1 D1_u0 D1_u1"
    assert [entry.name for entry in found.entries] == names.split()
    assert {entry.kind for entry in found.entries} == {"o_proj", "down_proj"}
    assert found.last_layer == 1
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-6)
    assert all(row[np.abs(row).argmax()] > 0 for row in found.vectors)


def test_no_more_directions_than_the_numerical_rank(tiny_base: Path, tmp_path: Path) -> None:
    tuned = train(tiny_base, tmp_path / "a")
    weights = load_file(tuned / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    weights[key][:, 3] = weights[key][:, 1] * 2  # two columns say the same
    save_file(weights, tuned / "adapter_model.safetensors")
    assert compute_directions(tiny_base, tuned).manifest.ranks == {
        "O0": 3, "D0": 4, "O1": 4, "D1": 4
    }  # fmt: skip


def test_saved_and_loaded_is_the_same(tiny_base: Path, tmp_path: Path) -> None:
    found = compute_directions(tiny_base, train(tiny_base, tmp_path / "a"), model_name="prod")
    artefact.save(found, tmp_path / "out")
    again = artefact.load(tmp_path / "out")
    assert again.entries == found.entries
    assert again.manifest == found.manifest
    assert again.hash == found.hash
    np.testing.assert_array_equal(again.vectors, found.vectors)
    document = json.loads((tmp_path / "out/directions.json").read_text())
    assert document["directions"][5]["name"] == found.entries[5].name


def test_hash_tells_artefacts_apart(tiny_base: Path, tmp_path: Path) -> None:
    tuned = train(tiny_base, tmp_path / "a")
    kinds = [{}, {"top_k": 3}, {"skip_last": 2}]
    hashes = {compute_directions(tiny_base, tuned, **kind).hash for kind in kinds}
    (tiny_base / "chat_template.jinja").write_text("another template")
    hashes.add(compute_directions(tiny_base, tuned).hash)
    (tiny_base / "chat_template.jinja").unlink()
    assert len(hashes) == 4


def test_hash_is_the_same_where_only_rounding_or_the_name_differ(
    tiny_base: Path, tmp_path: Path
) -> None:
    found = compute_directions(tiny_base, train(tiny_base, tmp_path / "a"))
    rounded = replace(found, vectors=np.nextafter(found.vectors, np.float32(1)))
    renamed = replace(found, manifest=replace(found.manifest, model_name="other"))
    assert found.hash == rounded.hash == renamed.hash


REFUSED_ADAPTERS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no configuration": (
        lambda f: (f / "adapter_config.json").unlink(),
        "neither adapter_config.json nor config.json",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "safetensors"),
    "broken weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"),
        "cannot read",
    ),
    "broken configuration": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read"),
    "DoRA": (edit("adapter_config.json", lambda c: c.update(use_dora=True)), "DoRA"),
    "biases": (edit("adapter_config.json", lambda c: c.update(bias="all")), "bias"),
    "not LoRA": (edit("adapter_config.json", lambda c: c.update(peft_type="IA3")), "not a LoRA"),
    "PiSSA": (
        edit("adapter_config.json", lambda c: c.update(init_lora_weights="pissa")),
        "base weights",
    ),
    "other rank": (edit("adapter_config.json", lambda c: c.update(r=5)), "rank"),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_unusable_adapters_are_refused_in_one_line(
    tiny_base: Path, tmp_path: Path, case: str
) -> None:
    damage, words = REFUSED_ADAPTERS[case]
    tuned = train(tiny_base, tmp_path / "tuned")
    damage(tuned)
    with pytest.raises(ConfigurationError, match=words) as caught:
        compute_directions(tiny_base, tuned)
    assert "\n" not in str(caught.value)


def test_untrained_and_unmonitored_adapters_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    untrained = train(tiny_base, tmp_path / "zero", init_lora_weights=True)
    with pytest.raises(ConfigurationError, match="changes nothing"):
        compute_directions(tiny_base, untrained)
    elsewhere = train(tiny_base, tmp_path / "q", target_modules=["q_proj"])
    with pytest.raises(ConfigurationError, match="nothing to monitor"):
        compute_directions(tiny_base, elsewhere)


def test_an_adapter_with_nan_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    tuned = train(tiny_base, tmp_path / "nan")
    weights = load_file(tuned / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(weights, tuned / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=r"NaN or Inf in model\.layers\.1\.mlp\.down_proj"):
        compute_directions(tiny_base, tuned)


@pytest.mark.parametrize(("hidden", "layers"), [(16, LAYERS), (HIDDEN, LAYERS - 1)])
def test_an_adapter_of_another_base_is_refused(
    tiny_base: Path, tmp_path: Path, hidden: int, layers: int
) -> None:
    other = save_tiny(tmp_path / "other", hidden=hidden, layers=layers)
    tuned = train(tiny_base, tmp_path / "tuned")
    with pytest.raises(ConfigurationError, match=r"another base: .*model\.layers\.\d"):
        compute_directions(other, tuned)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """As bitsandbytes stores it in 4 bits: two elements a byte, one below the other."""
    return torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)


QUANTISED = {
    "4 bits": (packed, "is U8 288x1"),
    "fp8": (lambda weight: weight.to(torch.float8_e4m3fn), "is F8_E4M3 24x24"),
}
TRAINED = {
    "by LoRA": {"target_modules": ["o_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
}


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_base_is_not_called_another(
    tiny_base: Path, tmp_path: Path, case: str, options: dict[str, Any]
) -> None:
    tuned = train(tiny_base, tmp_path / "tuned", **options)
    quantise, words = QUANTISED[case]
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    changed = {name: quantise(each) if "_proj" in name else each for name, each in weights.items()}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=rf"{words}, .* before it was quantised") as caught:
        compute_directions(base, tuned)
    assert "\n" not in str(caught.value)


def test_a_family_that_is_not_known_is_refused_with_what_to_do(
    tiny_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    edit("config.json", lambda c: c.update(model_type="bloom"))(other)
    words = "'bloom', which is not known; add a row .*families.py.*docs/architectures.md"
    with pytest.raises(ConfigurationError, match=words) as caught:
        compute_directions(other, train(tiny_base, tmp_path / "tuned"))
    assert "\n" not in str(caught.value)


def test_check_model_names_what_differs(tiny_base: Path, tmp_path: Path) -> None:
    tuned = train(tiny_base, tmp_path / "tuned")
    found = compute_directions(tiny_base, tuned)
    check_model(found, tiny_base, tuned)
    with pytest.raises(ConfigurationError, match="another model: --base"):
        check_model(found, save_tiny(tmp_path / "other", seed=1), tuned)
    with pytest.raises(ConfigurationError, match="another model: --tuned"):
        check_model(found, tiny_base, train(tiny_base, tmp_path / "b", lora_alpha=7))


REFUSED_ARTEFACTS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no document": (lambda f: (f / "directions.json").unlink(), "cannot read"),
    "no vectors": (lambda f: (f / "directions.safetensors").unlink(), "cannot read"),
    "other version": (edit("directions.json", lambda c: c.update(format="x/2")), "is not"),
    "other vectors": (lambda f: (f / "directions.safetensors").write_bytes(b"x"), "corrupt"),
    "a name lost": (edit("directions.json", lambda c: c["directions"].pop()), "corrupt"),
    "a key lost": (edit("directions.json", lambda c: c.pop("base_hash")), "corrupt"),
    "a key more": (edit("directions.json", lambda c: c.update(more=1)), "corrupt"),
}


@pytest.mark.parametrize("case", REFUSED_ARTEFACTS)
def test_damaged_artefacts_are_refused_in_one_line(
    tiny_base: Path, tmp_path: Path, case: str
) -> None:
    damage, words = REFUSED_ARTEFACTS[case]
    artefact.save(compute_directions(tiny_base, train(tiny_base, tmp_path / "a")), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ConfigurationError, match=words) as caught:
        artefact.load(tmp_path / "out")
    assert "\n" not in str(caught.value)
