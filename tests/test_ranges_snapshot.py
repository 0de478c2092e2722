"""Ranges as bytes and as a folder: the same again, or a refusal that says why."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.artefacts import read_json, sha256_file, write_json
from schemas.errors import ConfigurationError
from schemas.records import ABSENT
from transforms.ranges.calibration import calibrate
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.snapshots import load_snapshot, save_snapshot

HASH = "d" * 64


def some_ranges(n: int = 60, seed: int = 0, model: str = "a-model") -> Ranges:
    """Ranges over two directions, a few conversations without assistant."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-2000, 9000, (n, 8)).astype(np.int32)
    values[: n // 6, [2, 3, 6, 7]] = ABSENT
    return calibrate(values, np.full(n, 100), HASH, model)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.text(max_size=8))
def test_bytes_read_back_and_hash_names_the_content(n: int, m: int, model: str) -> None:
    one, other = some_ranges(n, 1, model), some_ranges(m, 2, model)
    again = Ranges.from_bytes(one.to_bytes())
    assert (again.hash, again.model, again.to_bytes()) == (one.hash, model, one.to_bytes())
    assert close(one, other).hash == close(other, one).hash
    assert close(one, one.emptied()).hash == one.hash
    assert (close(one, other).hash == one.hash) == (m == 0)


def test_hash_depends_on_model_and_directions() -> None:
    hashes = {
        Ranges.empty(directions, digest, model).hash
        for directions in (1, 2)
        for digest in (HASH, "e" * 64)
        for model in ("a", "b")
    }
    assert len(hashes) == 8


def test_another_process_makes_the_same_bytes_and_hash() -> None:
    ranges = some_ranges()
    script = (
        "import sys; from transforms.ranges.ranges import Ranges;"
        "r = Ranges.from_bytes(sys.stdin.buffer.read()); sys.stdout.buffer.write(r.to_bytes());"
        "sys.stderr.write(r.hash)"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, input=ranges.to_bytes(), capture_output=True, check=True, cwd=root
    )
    assert done.stdout == ranges.to_bytes()
    assert done.stderr.decode() == ranges.hash


def test_pickles_are_small_and_read_back() -> None:
    ranges = some_ranges()
    pickled = pickle.dumps(ranges)
    assert len(pickled) < len(ranges.to_bytes()) + 500
    assert pickle.loads(pickled).hash == ranges.hash


def test_ranges_of_another_model_or_directions_do_not_mix() -> None:
    ranges = some_ranges()
    with pytest.raises(ConfigurationError, match=r"'other'.*'a-model'"):
        ranges.merged(some_ranges(model="other"))
    with pytest.raises(ConfigurationError, match="eeee"):
        ranges.merged(Ranges.empty(2, "e" * 64, "a-model"))


@pytest.mark.parametrize("cut", [0, 3, 8, 200, -1])
def test_cut_off_bytes_are_not_ranges(cut: int) -> None:
    with pytest.raises(ValueError, match="not"):
        Ranges.from_bytes(some_ranges().to_bytes()[:cut])


def test_snapshot_reads_back_with_its_story(tmp_path: Path) -> None:
    ranges, folder = some_ranges(), tmp_path / "made" / "ranges"
    save_snapshot(ranges, folder, {"input": "log.jsonl"})
    assert load_snapshot(folder, HASH).hash == ranges.hash
    manifest = json.loads((folder / "ranges.json").read_text())
    assert manifest["conversations"] == {"user": 60, "assistant": 50}
    assert manifest["scores"] == {"user": 60, "assistant": 50}
    assert manifest["score_rule"] == "budget/1"
    assert manifest["sha256"] == sha256_file(folder / "ranges.safetensors")
    assert manifest["made"] == {"input": "log.jsonl"}


def test_snapshot_of_other_directions_is_refused(tmp_path: Path) -> None:
    save_snapshot(some_ranges(), tmp_path, {})
    refused(tmp_path, "made for directions dddddddddddd, not eeeeeeeeeeee", "e" * 64)


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    save_snapshot(some_ranges(), tmp_path, {})
    tensors = tmp_path / "ranges.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    refused(tmp_path, "is not the file")


@pytest.mark.parametrize(("name", "value"), [("format", 3), ("score_rule", "budget/0")])
def test_other_versions_are_refused(tmp_path: Path, name: str, value: object) -> None:
    save_snapshot(some_ranges(), tmp_path, {})
    manifest = read_json(tmp_path / "ranges.json")
    write_json(tmp_path / "ranges.json", {**manifest, name: value})
    refused(tmp_path, f"has {name} {value!r}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    save_snapshot(some_ranges(), tmp_path, {})
    (tmp_path / "ranges.json").write_text(text)
    refused(tmp_path, "cannot be read")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no ranges snapshot")


def refused(folder: Path, why: str, digest: str = HASH) -> None:
    """Loading fails with one line that says why."""
    with pytest.raises(ConfigurationError, match=why) as failure:
        load_snapshot(folder, digest)
    assert "\n" not in str(failure.value)
