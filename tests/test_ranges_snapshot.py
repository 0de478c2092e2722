"""Ranges as bytes and as a folder: the same again, or a refusal that says why."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extremes import segments_from, stretches_from
from former_counts import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from schemas.artefacts import read_json, sha256_file, write_json
from schemas.errors import ConfigurationError
from schemas.records import ABSENT, Segments
from transforms.ranges.counts import Counts
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.scores import ScoreCounts
from transforms.ranges.series import Stretches
from transforms.ranges.snapshots import load_snapshot, save_snapshot

HASH = "d" * 64
FIXTURES = Path(__file__).parent / "fixtures"


def some_segments(n: int, seed: int = 0) -> Segments:
    """Of conversations over two directions, two segments a role; a sixth without assistant."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(n):
        roles = (0, 0) if row < n // 6 else (0, 1, 0, 1)
        rows.append([(role, *np.sort(rng.integers(-2000, 9000, (2, 2)), axis=0)) for role in roles])
    return segments_from(rows, 2)


def some_ranges(n: int = 60, seed: int = 0, model: str = "a-model") -> Ranges:
    """Ranges with the values of `some_segments`, and a score of every role in a conversation."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-500, 4000, (n, 2)).astype(np.int32)
    scores[: n // 6, 1] = ABSENT
    empty = Ranges.empty(2, HASH, model)
    counted = empty.plus(Stretches.of(some_segments(n, seed)))
    held = np.where(scores > 3000, 3000, ABSENT).astype(np.int32)
    return counted.plus_scores(scores, rng.integers(0, 4, (n, 2)), scores == ABSENT, held)


def test_segments_and_whole_conversations_are_counted_beside_each_other() -> None:
    ranges, apart = some_ranges(), Stretches.of(some_segments(60))
    assert same(ranges.segments, Counts.empty(2).plus(apart))
    assert same(ranges.conversations, Counts.empty(2).plus(apart.whole()))
    assert ranges.segments.stretches.tolist() == [120, 100]
    assert ranges.conversations.stretches.tolist() == [60, 50]
    assert ranges.segments.total == ranges.conversations.total == 60
    assert ranges.without_segments == 0
    np.testing.assert_array_equal(ranges.segments.maximum, ranges.conversations.maximum)


def test_of_a_long_conversation_few_segments_count_and_its_extremes_do() -> None:
    one = [(0, [-number, 0], [number, 0]) for number in range(100)]
    ranges = Ranges.empty(2, HASH, "a-model").plus(Stretches.of(segments_from([one], 2)))
    assert ranges.segments.stretches.tolist() == [8, 0]
    assert ranges.conversations.maximum[0] == 99
    assert ranges.segments.total == ranges.conversations.total == 1


def same(one: Counts | ScoreCounts, other: Counts | ScoreCounts) -> bool:
    """Whether two counts are equal in every array."""
    mine, theirs = one.to_arrays(), other.to_arrays()
    return mine.keys() == theirs.keys() and all(
        np.array_equal(mine[name], theirs[name]) for name in mine
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.text(max_size=8))
def test_bytes_read_back_and_hash_names_the_content(n: int, m: int, model: str) -> None:
    one, other = some_ranges(n, 1, model), some_ranges(m, 2, model)
    again = Ranges.from_bytes(one.to_bytes())
    assert (again.hash, again.model, again.to_bytes()) == (one.hash, model, one.to_bytes())
    for name in ("segments", "conversations", "scores"):
        assert same(getattr(again, name), getattr(one, name))
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


def test_hash_depends_on_segments_conversations_and_scores() -> None:
    empty = Ranges.empty(2, HASH, "a-model")
    apart = Stretches.of(some_segments(6))
    scores = np.zeros((6, 2), np.int32)
    lengths, absent = np.zeros((6, 2), np.int64), np.zeros((6, 2), np.bool_)
    found = [
        empty,
        empty.plus(apart),
        empty.plus(apart.whole()),
        empty.plus_scores(scores, lengths, absent),
        empty.plus_scores(scores, lengths + 1, absent),
        empty.plus_scores(scores, lengths, absent, scores),
        empty.plus_scores(scores, lengths, absent, scores - 8),
    ]
    assert len({ranges.hash for ranges in found}) == len(found)


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
    assert manifest["score_rule"] == "budget/3"
    assert manifest["format"] == 4
    assert manifest["directions"] == 2
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


@pytest.mark.parametrize(
    ("name", "value"), [("format", 3), ("format", 5), ("score_rule", "budget/2")]
)
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


# --- former formats -----------------------------------------------------------------------------


def identity(data: bytes) -> dict[str, Any]:
    """What the header of ranges as bytes says of them; its length stands in 8 bytes before it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["deltawatch"])


def as_bytes(arrays: dict[str, np.ndarray], number: int) -> bytes:
    """Ranges of a format."""
    story = {"format": number, "directions_hash": HASH, "model": "a-model"}
    return save(arrays, {"deltawatch": json.dumps(story)})


def arrays_before(values: np.ndarray, number: int) -> dict[str, np.ndarray]:
    """What format 1 or 2 held of whole conversations, values [n, 4D]: one count of everything."""
    counts = rows_of(Counts.empty(values.shape[1] // 4).plus(stretches_from(values)))
    counts["conversations"] = counts.pop("stretches")
    if number == 1:
        del counts["total"]
    scores = {
        f"{role}_score_{name}": np.array([5, 7], kind)
        for role in ("user", "assistant")
        for name, kind in (("bins", np.int32), ("counts", np.int64))
    }
    return {**counts, **scores, "absent": np.array([0, 3])}


def test_ranges_say_their_format() -> None:
    ranges = some_ranges()
    assert identity(ranges.to_bytes()) == {"format": 4, "directions_hash": HASH, "model": "a-model"}
    arrays = load(ranges.to_bytes())
    assert Ranges.from_bytes(as_bytes(arrays, 4)).hash == ranges.hash
    with pytest.raises(ValueError, match="format 5, newer than 4"):
        Ranges.from_bytes(as_bytes(arrays, 5))


@pytest.mark.parametrize("name", sorted(load(some_ranges(5).to_bytes())))
def test_ranges_with_a_missing_array_are_refused(name: str) -> None:
    arrays = load(some_ranges(5).to_bytes())
    del arrays[name]
    with pytest.raises(ValueError, match="is missing"):
        Ranges.from_bytes(as_bytes(arrays, 4))


def test_ranges_of_format_3_whose_histograms_are_rows_can_be_read() -> None:
    ranges, kinds = some_ranges(), ("segments", "conversations")
    rows = {
        f"{kind}.{name}": array
        for kind in kinds
        for name, array in rows_of(getattr(ranges, kind)).items()
    }
    scores = {
        name: array for name, array in load(ranges.to_bytes()).items() if not name.startswith(kinds)
    }
    found = Ranges.from_bytes(as_bytes({**rows, **scores}, 3))
    assert found.to_bytes() == replace(ranges, scores=ScoreCounts.empty()).to_bytes()


@pytest.mark.parametrize("number", [1, 2])
def test_of_a_former_format_the_counts_of_whole_conversations_are_kept(number: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-2000, 9000, (60, 8)).astype(np.int32)
    values[:10, [2, 3, 6, 7]] = ABSENT
    values[10:12] = ABSENT
    values[12, [0, 1, 4, 5]] = ABSENT
    ranges = Ranges.from_bytes(as_bytes(arrays_before(values, number), number))
    assert (ranges.directions_hash, ranges.model) == (HASH, "a-model")
    expected = Counts.empty(2).plus(stretches_from(values))
    np.testing.assert_array_equal(ranges.conversations.histogram, expected.histogram)
    np.testing.assert_array_equal(ranges.conversations.maximum, expected.maximum)
    assert ranges.conversations.stretches.tolist() == [57, 48]
    # Format 1 did not say how many there were: at least as many as have the more frequent role.
    assert ranges.conversations.total == {1: 57, 2: 58}[number]
    assert same(ranges.segments, Counts.empty(2))
    assert same(ranges.scores, ScoreCounts.empty())
    assert ranges.without_segments == ranges.conversations.total
    assert ranges.merged(some_ranges(30)).without_segments == ranges.conversations.total
    again = Ranges.from_bytes(ranges.to_bytes())
    assert identity(ranges.to_bytes())["format"] == 4
    assert again.hash == ranges.hash
    assert same(again.conversations, ranges.conversations)


@pytest.mark.parametrize(("state", "number"), [("state_1", 1), ("state_2", 2)])
def test_files_of_former_versions_can_be_read(state: str, number: int) -> None:
    found = []
    for path in (FIXTURES / state / "state/ranges").iterdir():
        data = path.read_bytes()
        arrays, ranges = load(data), Ranges.from_bytes(data)
        assert identity(data)["format"] == number
        assert ranges.directions_hash == identity(data)["directions_hash"]
        assert ranges.conversations.maximum.tolist() == arrays["maximum"].tolist()
        assert ranges.conversations.histogram.sum() == arrays["counts"].sum()
        assert same(ranges.segments, Counts.empty(ranges.conversations.directions))
        assert ranges.scores.n == (0, 0)
        found.append(ranges.conversations.stretches.tolist())
    assert sorted(found) == [[1, 1], [9, 9]]


@pytest.mark.parametrize("name", ["counts", "conversations"])
def test_damaged_ranges_of_a_former_format_are_refused(name: str) -> None:
    arrays = arrays_before(np.full((4, 8), 700, np.int32), 2)
    arrays[name] = arrays[name] + 1
    with pytest.raises(ValueError, match="add up"):
        Ranges.from_bytes(as_bytes(arrays, 2))


def refused(folder: Path, why: str, digest: str = HASH) -> None:
    """Loading fails with one line that says why."""
    with pytest.raises(ConfigurationError, match=why) as failure:
        load_snapshot(folder, digest)
    assert "\n" not in str(failure.value)
