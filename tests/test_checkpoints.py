"""Directions of full checkpoints: against LAPACK, against the adapter, against known rounding."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lapack import largest_component_positive, svd_of_checkpoints
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LAYERS, edit, save_tiny
from transformers import AutoModelForCausalLM

from pipeline import report
from pipeline.cli import main
from schemas.errors import ConfigurationError
from transforms.model import directions as artefact
from transforms.model.checkpoint import stored_tensors
from transforms.model.difference import left_singular
from transforms.model.directions import Directions, check_model, compute_directions
from transforms.model.loading import load_trunk

WEIGHTS = "model.safetensors"
NOBODY = 65534
O1 = "model.layers.1.self_attn.o_proj.weight"
D1 = "model.layers.1.mlp.down_proj.weight"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def fine_tune(base: Path, out: Path, size: float = 1e-3, seed: int = 3) -> Path:
    """Every weight moved at random: no difference has a low rank."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn_like(weight)
    model.save_pretrained(out)
    return out


def save_again(folder: Path, out: Path, dtype: torch.dtype, **options: Any) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(out, **options)
    return out


def change(*names: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """What changes these tensors in a folder."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, **{name: by(tensors[name]) for name in names}}, folder / WEIGHTS)

    return apply


def assert_is_lapacks(found: Directions, base: Path, tuned: Path, top_k: int) -> None:
    layers = range(found.manifest.layers - found.manifest.skip_last)
    expected = svd_of_checkpoints(base, tuned, layers)
    row = 0
    for matrix, (u, s) in expected.items():
        for index in range(top_k):
            assert found.entries[row].name == f"{matrix}_u{index}"
            np.testing.assert_allclose(found.entries[row].singular_value, s[index], rtol=1e-9)
            vector = largest_component_positive(u[:, index])
            np.testing.assert_allclose(found.vectors[row], vector, atol=1e-6)
            row += 1
    assert row == len(found)


# --- full fine-tunes ---------------------------------------------------------------------------


@pytest.mark.parametrize("intermediate", [16, 36, 90], ids=["tall", "wide", "wider"])
def test_a_full_fine_tune_against_lapack(tmp_path: Path, intermediate: int) -> None:
    base = save_tiny(tmp_path / "base", intermediate=intermediate)
    tuned = fine_tune(base, tmp_path / "tuned")
    found = compute_directions(base, tuned, top_k=7, skip_last=2)
    assert_is_lapacks(found, base, tuned, 7)
    assert set(found.manifest.ranks.values()) == {7}
    assert found.manifest.model_name == "tuned"


def test_no_more_directions_than_the_matrix_has(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned")
    found = compute_directions(base, tuned, top_k=100)
    assert set(found.manifest.ranks.values()) == {HIDDEN}
    assert {part.cut for part in found.manifest.rounding.values()} == {0}


def test_shards_do_not_matter(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned")
    found = compute_directions(base, tuned)
    sharded = [
        save_again(folder, tmp_path / f"{folder.name}-sharded", torch.float32, max_shard_size="9KB")
        for folder in (base, tuned)
    ]
    assert len(list(sharded[1].glob("*.safetensors"))) > 5
    again = compute_directions(*sharded)
    np.testing.assert_array_equal(again.vectors, found.vectors)
    assert again.entries == found.entries
    assert again.manifest.rounding == found.manifest.rounding
    assert again.hash != found.hash, "other files"


def test_a_model_saved_without_its_head(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned")
    trunk = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).model
    trunk.save_pretrained(tmp_path / "trunk")
    assert "layers.0.mlp.down_proj.weight" in load_file(tmp_path / "trunk" / WEIGHTS)
    found = compute_directions(base, tmp_path / "trunk")
    np.testing.assert_array_equal(found.vectors, compute_directions(base, tuned).vectors)
    weights = [load_trunk(None, folder, 1).state_dict() for folder in (tmp_path / "trunk", tuned)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_matrices_that_did_not_change_have_no_directions(base: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    change(D1, by=lambda weight: weight + 1e-3)(tuned)
    manifest = compute_directions(base, tuned).manifest
    assert manifest.ranks == {"D1": 1}
    assert manifest.rounding["D1"].cut == 19
    assert manifest.rounding["D1"].floor > 0
    assert manifest.rounding["O0"].floor == manifest.rounding["O0"].cut == 0


def test_progress_is_told_after_every_matrix(base: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tuned = fine_tune(base, tmp_path / "tuned")
    compute_directions(base, tuned, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_check_model_without_the_base(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned")
    found = compute_directions(base, tuned)
    check_model(found, None, tuned)
    with pytest.raises(ConfigurationError, match="another model: --tuned"):
        check_model(found, None, fine_tune(base, tmp_path / "other", seed=4))


def test_rounding_is_saved_and_older_artefacts_are_read(base: Path, tmp_path: Path) -> None:
    found = compute_directions(base, fine_tune(base, tmp_path / "tuned"))
    artefact.save(found, tmp_path / "out")
    assert artefact.load(tmp_path / "out").manifest == found.manifest
    edit("directions.json", lambda c: c.pop("rounding"))(tmp_path / "out")
    older = artefact.load(tmp_path / "out")
    assert older.manifest == replace(found.manifest, rounding={})
    assert older.hash == found.hash
    edit("directions.json", lambda c: c.update(rounding={"O0": {"floor": 1}}))(tmp_path / "out")
    with pytest.raises(ConfigurationError, match="corrupt"):
        artefact.load(tmp_path / "out")


# --- no difference -----------------------------------------------------------------------------


UNCHANGED: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "itself": (torch.float32, torch.float32, {}),
    "other shards": (torch.float32, torch.float32, {"max_shard_size": "5KB"}),
    "rounded": (torch.float32, torch.bfloat16, {}),
    "rounded less": (torch.float32, torch.float16, {}),
    "base rounded": (torch.bfloat16, torch.float32, {}),
    "base rounded less": (torch.float16, torch.float32, {}),
    "widened": (torch.bfloat16, torch.bfloat16, {}),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_an_unchanged_checkpoint_is_no_difference(base: Path, tmp_path: Path, case: str) -> None:
    before, after, options = UNCHANGED[case]
    one = save_again(base, tmp_path / "base", before)
    other = save_again(base, tmp_path / "tuned", after, **options)
    if case == "widened":
        one = save_again(one, tmp_path / "wide", torch.float32)
    with pytest.raises(ConfigurationError, match="at most another dtype") as caught:
        compute_directions(one, other)
    assert "\n" not in str(caught.value)


def test_a_change_elsewhere_is_no_difference(base: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    change("model.layers.0.self_attn.q_proj.weight", by=lambda weight: weight * 2)(tuned)
    with pytest.raises(ConfigurationError, match="no difference"):
        compute_directions(base, tuned)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["narrow", "wide again"])
def test_a_difference_that_rounding_hides(base: Path, tmp_path: Path, stored: torch.dtype) -> None:
    """A change far below the unit in the last place flips some weights, at random."""
    tuned = fine_tune(base, tmp_path / "tuned", size=1e-6)
    rounded = save_again(tuned, tmp_path / "rounded", torch.bfloat16)
    rounded = save_again(rounded, tmp_path / "stored", stored)
    with pytest.raises(ConfigurationError, match="base float32, tuned bfloat16") as caught:
        compute_directions(base, rounded)
    assert "\n" not in str(caught.value)
    assert len(compute_directions(base, tuned)) == 4 * 20


# --- what rounding is, where the true difference is known --------------------------------------


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@dataclass(frozen=True)
class Rounded:
    """Two stored matrices, and the low-rank difference they had before they were rounded."""

    base: torch.Tensor
    tuned: torch.Tensor
    exact: np.ndarray

    @property
    def noise(self) -> float:
        """The largest singular value of what rounding did."""
        difference = self.tuned.double().numpy() - self.base.double().numpy()
        return float(np.linalg.norm(difference - self.exact, 2))


@st.composite
def rounded(draw: st.DrawFn, spread: float) -> Rounded:
    """Rows and columns of the weights differ by factors of about e^spread, at most."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.sampled_from([(96, 96), (72, 200), (120, 64)]))
    rank = draw(st.integers(1, 6))
    scales = [np.exp(draw(st.floats(0, spread)) * rng.normal(size=n)) for n in (rows, columns)]
    weights = 0.02 * scales[0][:, None] * rng.normal(size=(rows, columns)) * scales[1]
    left = rng.normal(size=(rows, rank)) * np.geomspace(3e-4, 3e-6, rank)
    exact = left @ rng.normal(size=(rank, columns))
    base = torch.from_numpy(weights).to(draw(DTYPES))
    # The tuning began with the base as stored, or with one that was rounded only afterwards.
    start = base.double().numpy() if draw(st.booleans()) else weights
    return Rounded(base, torch.from_numpy(start + exact).to(draw(DTYPES)), exact)


@given(rounded(spread=1))
def test_noise_is_never_kept(case: Rounded) -> None:
    found = left_singular(case.base, case.tuned, 20)
    u, s, _ = np.linalg.svd(case.exact)
    rank = int(np.sum(s > 1e-12 * s[0]))
    assert len(found.values) <= rank
    inside = np.linalg.norm(found.vectors @ u[:, :rank], axis=1)
    assert (inside > 0.75).all()
    # |(I - P) u| = |(I - P) N v| / s for the projector P on the true directions and the noise N.
    assert (inside**2 >= 1 - (case.noise / found.values) ** 2 - 1e-9).all()
    assert found.rounding is not None
    assert found.rounding.cut == 20 - len(found.values)


@given(rounded(spread=0.25))
def test_what_is_clear_of_the_noise_is_kept(case: Rounded) -> None:
    found = left_singular(case.base, case.tuned, 20)
    s = np.linalg.svd(case.exact, compute_uv=False)
    assert len(found.values) >= np.sum(s > 4 * case.noise)


@pytest.mark.parametrize("roundings", [1, 2])
def test_the_floor_by_hand(roundings: int) -> None:
    """One unit everywhere: 1.25 sigma (sqrt(m) + sqrt(n)), a variance of ulp^2 / 12 a rounding."""
    torch.manual_seed(0)
    ulp = 2.0**-7  # of bfloat16 between 1 and 2
    exact = 1.05 + 0.8 * torch.rand(300, 500)
    tuned = (exact + 0.1 * torch.rand(300, 1) * torch.rand(500)).to(torch.bfloat16)
    base = exact.to(torch.bfloat16) if roundings == 2 else exact
    rounding = left_singular(base, tuned, 20).rounding
    assert rounding is not None
    expected = 1.25 * ulp * np.sqrt(roundings / 12) * (np.sqrt(300) + np.sqrt(500))
    assert expected * 0.98 < rounding.floor < expected * 1.05


# --- the real model with the real adapter ------------------------------------------------------


FIRST_FEW = {"skip_last": 25}


@pytest.fixture(scope="module")
def of_adapter(base_model: Path, adapter: Path) -> Directions:
    return compute_directions(base_model, adapter, **FIRST_FEW)


@pytest.mark.parametrize(
    ("dtype", "lost", "worst"),
    [("float32", 0, 0.9999), ("float16", 0, 0.99), ("bfloat16", 3, 0.98)],
)
def test_the_merged_organism_has_the_directions_of_its_adapter(
    base_model: Path,
    merged: Path,
    of_adapter: Directions,
    tmp_path: Path,
    dtype: str,
    lost: int,
    worst: float,
) -> None:
    tuned = merged
    if dtype != "float32":
        tuned = save_again(merged, tmp_path / dtype, getattr(torch, dtype))
    found = compute_directions(base_model, tuned, **FIRST_FEW)
    exact = {
        entry.name: row for entry, row in zip(of_adapter.entries, of_adapter.vectors, strict=True)
    }
    assert {entry.name for entry in found.entries} <= exact.keys(), "no direction is noise"
    assert len(exact) - len(found) <= lost
    cosines = [found.vectors[i] @ exact[entry.name] for i, entry in enumerate(found.entries)]
    assert min(np.abs(cosines)) >= worst
    for matrix, part in found.manifest.rounding.items():
        assert (part.base_precision, part.tuned_precision) == ("float32", dtype)
        assert part.cut == 20 - found.manifest.ranks[matrix]


# --- what is refused ---------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[name]
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return apply


def with_other_names(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace("down_proj", "w2"): tensors[key] for key in tensors}, folder / WEIGHTS)


def doubled(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, f"other.{O1}": tensors[O1].clone()}, folder / WEIGHTS)


def lacking_a_shard(folder: Path) -> None:
    save_again(folder, folder, torch.float32, max_shard_size="9KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    next(folder.glob("model-00002-of-*")).unlink()


def with_empty_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"metadata": {}}')


CONFIG = "config.json"
REFUSED = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "neither adapter_config.json nor"),
    "broken configuration": (lambda f: (f / CONFIG).write_text("{"), "cannot read model config"),
    "no layers": (edit(CONFIG, lambda c: c.pop("num_hidden_layers")), "names no num_hidden_layers"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "save the model as safetensors"),
    "broken weights": (lambda f: (f / WEIGHTS).write_bytes(b"x"), "cannot read weights"),
    "a shard lost": (lacking_a_shard, "lacks weight file model-00002-of"),
    "an empty index": (with_empty_index, "index.json names no weight files"),
    "a tensor lost": (without(O1), r"has no self_attn\.o_proj\.weight of layer 1"),
    "other names": (with_other_names, r"has no mlp\.down_proj\.weight of layer 0"),
    "two of a name": (doubled, f"has both .*{O1} and"),
    "other family": (
        edit(CONFIG, lambda c: c.update(model_type="gemma2")),
        "its model_type is gemma2",
    ),
    "other kind": (edit(CONFIG, lambda c: c.update(model_type="qwen2")), "its model_type is qwen2"),
    "other shape": (change(D1, by=lambda w: w[:, 1:].contiguous()), r"24x35, in --base \S+ 24x36"),
    "NaN": (change(D1, by=lambda w: w.clone().fill_(torch.nan)), f"NaN or Inf in {D1}"),
    "infinity": (change(O1, by=lambda w: w / 0), f"NaN or Inf in {O1}"),
    "quantised": (change(O1, by=lambda w: w.to(torch.int8)), "is I8 24x24, not a plain matrix"),
    "in 4 bits": (
        change(O1, by=lambda w: torch.zeros(288, 1, dtype=torch.uint8)),
        "is U8 288x1, not a plain matrix",
    ),
    "packed": (change(O1, by=lambda w: w.to(torch.float8_e4m3fn)), "before it was quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_checkpoints_are_refused_in_one_line(
    base: Path, tmp_path: Path, case: str
) -> None:
    damage, words = REFUSED[case]
    tuned = fine_tune(base, tmp_path / "tuned")
    damage(tuned)
    with pytest.raises(ConfigurationError, match=words) as caught:
        compute_directions(base, tuned)
    assert "\n" not in str(caught.value)


@contextmanager
def permissions_count() -> Iterator[None]:
    """Be a user who may not read everything: root may."""
    user = os.geteuid()
    os.seteuid(user or NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_not_reported_as_missing(base: Path, name: str) -> None:
    with TemporaryDirectory() as place:
        tuned = fine_tune(base, Path(place) / "tuned")
        (tuned / "tokenizer.json").touch()
        found = compute_directions(base, tuned)
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755)
        (tuned / name).chmod(0)
        refused = rf"cannot read \S+/{name} \(Permission denied\)"
        with permissions_count(), pytest.raises(ConfigurationError, match=refused):
            check_model(found, None, tuned)


def test_weights_that_may_not_be_read_are_not_reported_as_missing(base: Path) -> None:
    with TemporaryDirectory() as place:
        tuned = fine_tune(base, Path(place) / "tuned")
        Path(place).chmod(0o755)
        (tuned / WEIGHTS).chmod(0)
        with permissions_count(), pytest.raises(ConfigurationError, match="Permission denied"):
            stored_tensors(tuned)


def test_weights_that_a_checkpoint_lacks_are_not_made_up(base: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    without("model.layers.0.self_attn.q_proj.weight")(tuned)
    with pytest.raises(ConfigurationError, match=r"lacks model\.layers\.0\.self_attn\.q_proj"):
        load_trunk(None, tuned, 1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hidden": 16}, "its hidden_size is 16, that of .* is 24"),
        ({"layers": LAYERS + 1}, "its num_hidden_layers is 6"),
        ({"intermediate": 40}, "its intermediate_size is 40"),
        ({"seed": 1}, r"layers\.0\.self_attn\.o_proj\.weight is further from that"),
    ],
)
def test_a_checkpoint_of_another_base_is_refused(
    base: Path, tmp_path: Path, other: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        compute_directions(base, save_tiny(tmp_path / "other", **other))
    assert "was made from another base" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the command -------------------------------------------------------------------------------


def test_the_command_says_how_far_it_is_and_what_was_cut(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "PROGRESS_SECONDS", 0)
    tuned = shutil.copytree(base, tmp_path / "tuned")
    change(D1, by=lambda weight: weight + 1e-3)(tuned)
    options = [f"--base={base}", f"--tuned={tuned}", f"--out={tmp_path / 'out'}"]
    assert main(["directions", *options]) == 0
    said = capsys.readouterr().err
    assert re.findall(r"(.+) done, about \d+ s left", said) == [
        f"{n} of 4 matrices" for n in (1, 2, 3)
    ]
    assert "1 directions of 1 layers in" in said
    assert "19 more of the largest 20 of each matrix cannot be told from rounding" in said
    assert "3 of 4 matrices did not change" in said
    monkeypatch.undo()
    assert main(["directions", f"--base={base}", f"--tuned={base}", options[2]]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("deltawatch: no difference between ")
    assert refused.count("\n") == 1
