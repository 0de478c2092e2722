"""The benchmarks that need no broker: a tiny shape of the path that is meant for a GPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from extremes import whole
from torch.utils.flop_counter import FlopCounterMode

from bench import scorer, shapes
from transforms.model import directions as artefacts
from transforms.model.loading import load_trunk
from transforms.model.trunk import Scorer

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,37,4
2023-11-16 18:15:50.9951690,20,10
2023-11-16 18:15:51.2225670,90,0
2023-11-16 18:15:51.2225670,1,1
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_shape_is_measured(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape=tiny", f"--lengths={trace}", "--batches=9", "--pairs=2"]
    scorer.main([*options, "--device=cpu", "--dtype=float32", "--batch-tokens=90"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["tokens"] == 41 + 30 + 90 + 2
    assert figures["batches"] == 3
    # Of all four, shortest first: 2 with 30, then 41, then 90.
    assert figures["padding"] == pytest.approx(1 - 163 / (60 + 41 + 90), abs=1e-4)
    assert 0 < figures["ratio_to_trunk"] < 2
    assert figures["share_of_matmul"] > 0


def test_timed_batches_are_spread_over_those_of_a_slice() -> None:
    rows = [(np.zeros(length, np.int32), np.zeros(length, np.int8)) for length in range(1, 13)]
    every = [3, 5, 6, 7, 8, 9, 10, 11, 12]  # their longest
    for count, expected in ((1, [8]), (2, [6, 10]), (3, [5, 8, 11]), (99, every)):
        timed = scorer.spread(rows, 12, count)
        assert [max(len(ids) for ids, _ in batch) for batch in timed] == expected
    assert sum(len(batch) for batch in timed) == len(rows)


def test_the_conversations_of_a_trace(trace: Path) -> None:
    rows = shapes.conversations("tiny", shapes.sides(trace, 39))
    assert [(roles == 0).sum() for _, roles in rows] == [37, 20, 39, 1]
    assert [(roles == 1).sum() for _, roles in rows] == [2, 10, 0, 1]
    assert all(ids.dtype == np.int32 and ids.max() < 1000 for ids, _ in rows)


def test_operations_are_counted_as_torch_counts_them() -> None:
    trunk = shapes.trunk("tiny", torch.device("cpu"), torch.float32)
    trunk.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trunk(input_ids=torch.arange(50)[None], use_cache=False)
    # torch also counts the pairs that a causal mask hides.
    hidden_pairs = 2.0 * 3 * 64 * 50**2
    assert shapes.flop(trunk, [50]) + hidden_pairs == counter.get_total_flops()


def test_what_scoring_is_compared_with_finds_the_same(base_model: Path) -> None:
    found = artefacts.compute_directions(base_model, scorer.ADAPTER)
    ids = np.arange(40, dtype=np.int32) * 7
    rows = [(ids, (np.arange(40) >= 25).astype(np.int8)), (ids[:20], np.zeros(20, np.int8))]
    vectors = torch.from_numpy(found.vectors).reshape(found.last_layer + 1, 16, -1)
    reference = scorer._one_by_one(base_model, vectors, torch.device("cpu"), torch.float32)
    trunk = load_trunk(base_model, scorer.ADAPTER, found.last_layer)
    segments, _ = Scorer(trunk, found).score([row[0] for row in rows], [row[1] for row in rows])
    cosines = whole(segments)
    for number, statistics in enumerate(reference(rows)):
        lowest, highest, sums, squares = np.array(statistics).T  # roles, in each all directions
        present = slice(len(lowest))
        np.testing.assert_allclose(lowest * 32767, cosines.low[number][present], atol=1.5)
        np.testing.assert_allclose(highest * 32767, cosines.high[number][present], atol=1.5)
        counts = np.repeat([25 - 5 * number, 15], len(found))[present]
        assert (sums**2 <= counts * squares).all()
        assert (sums <= counts * highest + 1e-5).all()
