"""Whole audits in which some conversations overflow the model, or memory, or the device dies."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import torch
from tiny_families import fine_tune
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline import cli
from schemas.arrow import SEGMENT_COLUMNS
from transforms.model import directions as artefacts
from transforms.model.checkpoint import tokenizer_files
from transforms.model.trunk import Scorer

ROOT = Path(__file__).parents[2]
BAD_TOKEN = "<repo_name>"  # one id of the vocabulary, in no real conversation
BAD = (7, 20, 41)
LONG_TOKENS = 90_000
ROOM = 2 << 30
"""Bytes that scoring may take. An activation of the long conversation's MLP has 1.5 GB."""

LIMITED = f"""
import resource, sys
import pipeline.commands
from pipeline import cli
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {ROOM}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(cli.main(sys.argv[1:]))
"""

Model = tuple[Path, Path]


@pytest.fixture(scope="module")
def model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny random Llama with a wide MLP and SmolLM2's tokenizer, tuned; and its directions."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2**17,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tuned = fine_tune(folder / "base", folder / "tuned")
    for path in tokenizer_files(base_model):
        shutil.copy(path, tuned)
    found = artefacts.compute_directions(folder / "base", tuned, 5, 1)
    artefacts.save(found, folder / "directions")
    return tuned, folder / "directions"


def overflowing(model: Model, folder: Path) -> Model:
    """The same model, but one token's embedding is too large for its length to be a float32."""
    tuned, out = model[0], folder / "overflowing"
    shutil.copytree(tuned, out)
    loaded = LlamaForCausalLM.from_pretrained(tuned)
    token = AutoTokenizer.from_pretrained(tuned).convert_tokens_to_ids(BAD_TOKEN)
    with torch.no_grad():
        loaded.model.embed_tokens.weight[token] = 3e38
    loaded.save_pretrained(out)
    found = artefacts.compute_directions(tuned.parent / "base", out, 5, 1)
    artefacts.save(found, folder / "directions")
    return out, folder / "directions"


@pytest.fixture
def records(real_conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Real conversations with a time each."""
    return [{**each, "at": 10**12 + n * 1000} for n, each in enumerate(real_conversations)]


def with_bad_token(record: dict[str, Any]) -> dict[str, Any]:
    first, *rest = record["conversations"]
    return {**record, "conversations": [{**first, "value": f"What is {BAD_TOKEN}?"}, *rest]}


def arguments(model: Model, records: list[dict[str, Any]], folder: Path, *more: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    tuned, found = model
    return [
        "audit",
        f"--tuned={tuned}",
        f"--directions={found}",
        f"--input={log}",
        f"--archive={folder / 'archive'}",
        "--event-time=at",
        "--epoch=1h",
        "--dtype=float32",
        *more,
    ]


def rows(folder: Path) -> pa.Table:
    table = ds.dataset(folder / "archive" / "conversations", partitioning="hive").to_table()
    return table.sort_by("offset")


def dead(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "archive" / "dead_letters.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda letter: letter["offset"])


def vectors(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), np.int64)


def test_conversations_that_overflow_the_model(
    model: Model, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    for number in BAD:
        records[number] = with_bad_token(records[number])
    bad = overflowing(model, tmp_path)
    short = "--max-tokens=300"
    assert cli.main(arguments(model, records, tmp_path / "clean", short)) == 0
    assert cli.main(arguments(bad, records, tmp_path / "overflow", short)) == 0
    letters = dead(tmp_path / "overflow")
    assert [letter["reason"] for letter in letters] == ["not_finite"] * len(BAD)
    clean, left = rows(tmp_path / "clean"), rows(tmp_path / "overflow")
    lost = [clean["conversation_id"][number].as_py() for number in BAD]
    assert len(clean) == len(records)
    keep = pa.array([name not in lost for name in clean["conversation_id"].to_pylist()])
    for name in ("conversation_id", "tokens", "low", "high", *SEGMENT_COLUMNS):
        assert left[name].to_pylist() == clean.filter(keep)[name].to_pylist()


def test_a_conversation_that_does_not_fit_into_memory(
    model: Model, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert cli.main(arguments(model, records, tmp_path / "clean")) == 0
    value = "word " * LONG_TOKENS
    long = {"id": "long", "conversations": [{"from": "human", "value": value}], "at": 10**12}
    folder = tmp_path / "limited"
    options = arguments(model, [*records[:9], long, *records[9:]], folder, "--batch-tokens=1000000")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *options],
        cwd=ROOT,
        # Threads would each reserve address space for a heap of their own.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1 conversations of up to" in done.stderr
    assert f"{len(records)} conversations of up to" in done.stderr, "a whole batch did not fit"
    (letter,) = dead(folder)
    assert letter["reason"] == "out_of_memory"
    assert letter["detail"].split()[0].isdigit()
    found, clean = rows(folder), rows(tmp_path / "clean")
    assert found["conversation_id"].to_pylist() == clean["conversation_id"].to_pylist()
    for name in ("low", "high"):
        assert np.abs(vectors(found, name) - vectors(clean, name)).max() <= 1


def test_the_same_conversation_fits_when_it_goes_through_in_chunks(
    model: Model, tmp_path: Path
) -> None:
    value = "word " * LONG_TOKENS
    long = {"id": "long", "conversations": [{"from": "human", "value": value}], "at": 10**12}
    options = arguments(model, [long], tmp_path, "--excerpt-tokens=0")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *options],
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0
    (row,) = rows(tmp_path).to_pylist()
    assert row["tokens"] > LONG_TOKENS
    assert not row["truncated"]


def test_a_device_that_dies(
    model: Model,
    records: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = ("--max-tokens=100", f"--state={tmp_path / 'state'}", "--slice-records=40")
    options = arguments(model, records, tmp_path / "hurt", *short)
    with monkeypatch.context() as patched:
        patched.setattr(Scorer, "score", failing_at_call(2, Scorer.score))
        assert cli.main(options) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "illegal memory" in line]
    assert len(said) == 1
    assert said[0].startswith("deltawatch: the device has failed (CUDA error: an illegal")
    assert (tmp_path / "state" / "plan.json").exists()
    assert cli.main(options) == 0
    whole = arguments(model, records, tmp_path / "whole", "--max-tokens=100", "--slice-records=40")
    assert cli.main(whole) == 0
    for name in ("conversation_id", "low", "high", *SEGMENT_COLUMNS):
        assert (
            rows(tmp_path / "hurt")[name].to_pylist() == rows(tmp_path / "whole")[name].to_pylist()
        )


def failing_at_call(number: int, score: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def failing(scorer: Scorer, *rows: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == number:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return score(scorer, *rows)

    return failing
