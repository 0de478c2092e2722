"""Directions of checkpoints that are large or take long: memory, killed runs, what is explained."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lapack import svd_of_checkpoints
from safetensors.torch import load_file, save_file
from tiny_models import LAYERS, save_tiny

from pipeline.cli import main
from transforms.model import directions as artefact
from transforms.model.difference import left_singular
from transforms.model.directions import compute_directions
from transforms.model.rounding import noise, rounding_floor

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"

PEAK = """
    import sys
    from pathlib import Path
    from transforms.model import directions

    def peak_kb():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    small, large, out = (Path(argument) for argument in sys.argv[1:])
    directions.compute_directions(small / "base", small / "tuned")  # everything is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_kb()
    found = directions.compute_directions(large / "base", large / "tuned", skip_last=0)
    print(peak_kb() - before)
    directions.save(found, out)
"""


def peak_bytes(small: Path, large: Path, out: Path) -> int:
    """Most memory that the directions of `large` take above what Python and its modules take."""
    script = [sys.executable, "-c", textwrap.dedent(PEAK), str(small), str(large), str(out)]
    # Freed blocks go back to the system at once; glibc otherwise keeps a changing part of them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        script, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny base and of it tuned."""
    out = tmp_path_factory.mktemp("small")
    save_tiny(out / "base")
    tune(out / "base", out / "tuned", 0.01)
    return out


def tune(base: Path, out: Path, share: float) -> Path:
    """Every matrix moved at random, by this share of its length."""
    torch.manual_seed(3)
    shutil.copytree(base, out)
    moved = {
        name: weight + share * weight.std() * torch.randn_like(weight)
        for name, weight in load_file(base / WEIGHTS).items()
    }
    save_file(moved, out / WEIGHTS, {"format": "pt"})
    return out


def configure(folder: Path, hidden: int, layers: int, family: str = "llama") -> None:
    content = {"model_type": family, "hidden_size": hidden, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(content))


# --- one layer of an 8B model -------------------------------------------------------------------


HIDDEN, INTERMEDIATE, RANK = 4096, 14336, 6


def save_layer(folder: Path) -> np.ndarray:
    """Base and tuned in bfloat16; down_proj tuned by a known difference of rank 6.

    Returns its left singular vectors, [6, 4096].
    """
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(HIDDEN, INTERMEDIATE, generator=generator)
    left, _ = torch.linalg.qr(torch.randn(HIDDEN, RANK, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(INTERMEDIATE, RANK, generator=generator))
    tuned = base.bfloat16() + left * torch.linspace(3, 0.5, RANK) @ right.T
    output = 0.02 * torch.randn(HIDDEN, HIDDEN, generator=generator).bfloat16()
    for name, weight in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        configure(folder / name, HIDDEN, 1)
        tensors = {"mlp.down_proj": weight.bfloat16(), "self_attn.o_proj": output}
        named = {f"model.layers.0.{key}.weight": value for key, value in tensors.items()}
        save_file(named, folder / name / WEIGHTS)
    return left.T.numpy()


def test_a_layer_of_8b_in_the_memory_of_three_matrices(small: Path, tmp_path: Path) -> None:
    true = save_layer(tmp_path)
    matrix = HIDDEN * INTERMEDIATE * 2
    assert peak_bytes(small, tmp_path, tmp_path / "out") < 3 * matrix
    found = artefact.load(tmp_path / "out")
    assert [entry.name for entry in found.entries] == [f"D0_u{index}" for index in range(RANK)]
    assert np.abs((found.vectors * true).sum(axis=1)).min() > 0.99
    rounding = found.manifest.rounding["D0"]
    assert (rounding.cut, rounding.tuned_precision) == (20 - RANK, "bfloat16")
    assert found.entries[-1].singular_value > rounding.floor > 0


def test_the_floor_of_a_large_matrix_is_that_of_all_its_values() -> None:
    """Of a large one only a few singular values are known, and how long the rest is together."""
    torch.manual_seed(0)
    base = (0.02 * torch.randn(1100, 1200)).bfloat16()
    tuned = (base + 0.002 * torch.randn(1100, 5) @ torch.randn(5, 1200)).bfloat16()
    found = left_singular(base, tuned, 20)
    u, s, _ = np.linalg.svd((tuned.double() - base.double()).numpy())
    errors = noise([(base, tuned)], {torch.bfloat16})
    floor = rounding_floor(errors, lambda bound: float(np.linalg.norm(s[s <= bound])))
    assert found.rounding is not None
    assert found.rounding.floor == pytest.approx(floor, rel=1e-6)
    assert len(found.values) == np.sum(s > floor) == 5
    assert np.abs((found.vectors @ u[:, :5]).diagonal()).min() > 0.9999


LARGE = {"hidden": 256, "intermediate": 4096, "layers": 60}


def test_one_matrix_of_each_model_is_in_memory(small: Path, tmp_path: Path) -> None:
    for name, scale in (("base", 1), ("tuned", 1.01)):
        save_many(tmp_path / name, scale)
    matrix = LARGE["hidden"] * LARGE["intermediate"] * 4
    assert LARGE["layers"] * matrix > 250e6
    # LAPACK's float64 copies of a matrix that is small enough for it. Both models are 120 matrices.
    assert peak_bytes(small, tmp_path, tmp_path / "out") < 20 * matrix


def save_many(folder: Path, scale: float) -> Path:
    """Both matrices of 60 layers in shards of 3 layers, 270 MB, most of them the same."""
    folder.mkdir()
    shard: dict[str, torch.Tensor] = {}
    index = {}
    for layer in range(LARGE["layers"]):
        for name, width in (("self_attn.o_proj", "hidden"), ("mlp.down_proj", "intermediate")):
            key = f"model.layers.{layer}.{name}.weight"
            factor = scale if layer % 20 == 0 else 1
            weight = torch.ones(LARGE["hidden"], LARGE[width]).triu_()
            shard[key] = weight * factor
            index[key] = f"model-{layer // 3}.safetensors"
        if layer % 3 == 2:
            save_file(shard, folder / index[key])
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    configure(folder, LARGE["hidden"], LARGE["layers"])
    return folder


def test_one_expert_of_each_model_is_in_memory(small: Path, tmp_path: Path) -> None:
    for name, scale in (("base", 1), ("tuned", 1.01)):
        save_experts(tmp_path / name, scale)
    expert = LARGE["hidden"] * LARGE["intermediate"] * 4
    assert (
        peak_bytes(small, tmp_path, tmp_path / "out") < 20 * expert
    )  # both models are 120 of them


def save_experts(folder: Path, scale: float) -> Path:
    """A layer of 60 experts and three of one in shards of 3 experts, 260 MB, most the same."""
    folder.mkdir()
    size, width = LARGE["hidden"], LARGE["intermediate"]
    tensors = {
        f"model.layers.{layer}.self_attn.o_proj.weight": torch.eye(size) for layer in range(4)
    }
    experts = [(0, number) for number in range(60)] + [(layer, 0) for layer in (1, 2, 3)]
    index = {}
    for number, (layer, expert) in enumerate(experts):
        weight = torch.ones(size, width).triu_(expert) * (scale if expert % 10 == 0 else 1)
        tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"] = weight
        if number % 3 == 2:
            name = f"model-{number // 3}.safetensors"
            save_file(tensors, folder / name)
            index |= dict.fromkeys(tensors, name)
            tensors = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    configure(folder, size, 4, "mixtral")
    return folder


# --- runs that are killed -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base and of it tuned, whose matrices take about a tenth of a second each."""
    out = tmp_path_factory.mktemp("slow")
    save_tiny(out / "base", hidden=384, intermediate=512, layers=11)
    tune(out / "base", out / "tuned", 0.01)
    return out


def command(models: Path, out: Path, *more: str) -> list[str]:
    options = [f"--base={models / 'base'}", f"--tuned={models / 'tuned'}", f"--out={out}"]
    return ["directions", *options, *more]


def kill_after(count: int, cache: Path, arguments: list[str]) -> None:
    """SIGKILL a deltawatch once its cache has so many results."""
    script = [sys.executable, "-m", "pipeline.cli", *arguments]
    with subprocess.Popen(script, cwd=ROOT) as running:
        while len(kept(cache)) < count:
            assert running.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        running.kill()
    assert running.returncode == -signal.SIGKILL


def kept(cache: Path) -> dict[str, int]:
    """Results in a cache, with the time they were written."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("[!.]*.safetensors")}


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("named", [True, False], ids=["--cache", "no option"])
def test_a_killed_run_is_resumed(
    slow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    out = tmp_path / "out"
    cache = tmp_path / "cache" if named else out / "unfinished"
    arguments = command(slow, out, *([f"--cache={cache}"] if named else []))
    kill_after(5, cache, arguments)
    assert not (out / "directions.json").exists()
    before = kept(cache)
    assert 5 <= len(before) < 16
    assert main(arguments) == 0
    assert (
        f"{len(before)} matrices had been decomposed by an earlier run" in capsys.readouterr().err
    )
    if named:
        after = kept(cache)
        assert len(after) == 16
        assert before.items() <= after.items(), "none of them was written again"
    else:
        assert not cache.exists()
    assert main(command(slow, tmp_path / "undisturbed")) == 0
    assert content(out) == content(tmp_path / "undisturbed")


def said_again(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """How many results a run took from its cache."""
    capsys.readouterr()
    assert main(arguments) == 0
    match = re.search(r"(\d+) matrices had been", capsys.readouterr().err)
    return int(match[1]) if match else 0


def test_only_what_was_made_from_the_same_is_used_again(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = shutil.copytree(small, tmp_path / "models")
    arguments = command(models, tmp_path / "out", f"--cache={tmp_path / 'cache'}")
    assert said_again(arguments, capsys) == 0
    assert said_again(arguments, capsys) == 4
    assert said_again([*arguments, "--top-k=3"], capsys) == 0
    weights = load_file(models / "tuned" / WEIGHTS)
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(weights, models / "tuned" / WEIGHTS, {"format": "pt"})
    assert said_again(arguments, capsys) == 3
    whole = content(tmp_path / "out")
    for result in (tmp_path / "cache").iterdir():
        result.write_bytes(result.read_bytes()[:100])
    assert said_again(arguments, capsys) == 0
    assert content(tmp_path / "out") == whole


# --- what is explained --------------------------------------------------------------------------


def rows(text: str) -> Iterator[list[str]]:
    return (line.split() for line in text.splitlines() if re.match(r" *\d", line))


def test_the_table_against_lapack(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small, tmp_path / "out", "--explain", "--top-k=7", "--skip-last=2")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    exact = svd_of_checkpoints(small / "base", small / "tuned", range(LAYERS - 2))
    whole = sum(np.sum(s**2) for _, s in exact.values())
    table = list(rows(printed))
    assert len(table) == len(exact)
    for (matrix, (_, s)), cells in zip(exact.items(), table, strict=True):
        kind = {"O": "o_proj", "D": "down_proj"}[matrix[0]]
        assert cells[:3] == [matrix[1:], kind, "7"]
        np.testing.assert_allclose([float(cell) for cell in cells[3:7]], s[:4], rtol=5e-3)
        captured, of_all, changed = (float(cell.rstrip("%")) for cell in cells[7:])
        assert captured == pytest.approx(100 * np.sum(s[:7] ** 2) / np.sum(s**2), abs=0.06)
        assert of_all == pytest.approx(100 * np.sum(s**2) / whole, abs=0.06)
        assert changed == pytest.approx(1, abs=0.2)
    assert "WARNING" not in printed


def test_a_tuned_model_that_hardly_descends_from_the_base(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(small / "base", tmp_path / "tuned", 0.8)
    shutil.copytree(small / "base", tmp_path / "base")
    assert main(command(tmp_path, tmp_path / "out", "--explain")) == 0
    printed = capsys.readouterr().out
    assert "WARNING: 4 of 4 matrices changed by more than 50% of their length" in printed
    assert "hardly descends from this base" in printed


def test_progress_of_a_run_that_is_nearly_all_cached(small: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    for _ in range(2):
        compute_directions(
            small / "base",
            small / "tuned",
            progress=lambda done, total: told.append((done, total)),
            cache=artefact.Cache(tmp_path / "cache"),
        )
    assert told == 2 * [(done, 4) for done in range(1, 5)]
