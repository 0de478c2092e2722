"""The commands on a full checkpoint, without its base: scores are those of the adapter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from extremes import Extremes, whole

from pipeline.cli import main
from transforms import formats
from transforms.model.directions import compute_directions
from transforms.model.loading import load_tokenizer, load_trunk
from transforms.model.roles import tokenize
from transforms.model.trunk import Scorer

ROOT = Path(__file__).parents[2]
CONVERSATIONS, MAX_TOKENS = 40, 60
SKIP_LAST = 25  # of 30
START_S = 1_700_000_000


def test_a_merged_checkpoint_is_scored_as_its_adapter_is(
    base_model: Path,
    adapter: Path,
    merged: Path,
    conversations: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    log, directions, archive = (tmp_path / name for name in ("log.jsonl", "directions", "archive"))
    timed = [{**each, "at": START_S + n} for n, each in enumerate(conversations[:CONVERSATIONS])]
    log.write_text("".join(json.dumps(each) + "\n" for each in timed))

    made = [f"--base={base_model}", f"--out={directions}", f"--skip-last={SKIP_LAST}"]
    assert main(["directions", f"--tuned={merged}", *made]) == 0
    options = [f"--tuned={merged}", f"--directions={directions}", f"--input={log}"]
    options += ["--event-time=at", f"--max-tokens={MAX_TOKENS}", f"--archive={archive}"]
    subprocess.run([sys.executable, "-m", "pipeline.cli", "audit", *options], check=True, cwd=ROOT)

    found = ds.dataset(archive / "conversations", partitioning="hive").to_table().sort_by("offset")
    expected = scores_of_adapter(base_model, adapter, timed)
    for name in ("low", "high"):
        apart = np.array(found[name].to_pylist(), int) - getattr(expected, name)
        assert apart.shape == (CONVERSATIONS, 2 * 5 * 2 * 8), "roles, layers, matrices, rank"
        assert np.abs(apart).max() <= 1


def scores_of_adapter(base: Path, adapter: Path, records: list[dict[str, Any]]) -> Extremes:
    directions = compute_directions(base, adapter, skip_last=SKIP_LAST)
    scorer = Scorer(load_trunk(base, adapter, directions.last_layer, "cpu"), directions)
    tokenizer = load_tokenizer(base, adapter)
    messages = [formats.parse(json.dumps(record).encode()).messages for record in records]
    rows = tokenize(tokenizer, messages, MAX_TOKENS)
    scores, _ = scorer.score([ids for ids, _, _ in rows], [roles for _, roles, _ in rows])
    return whole(scores)
