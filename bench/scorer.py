"""What scoring costs beside the model itself: `python bench/scoring.py --data FOLDER`.

The same batches go through the scorer and through the bare trunk, one after the other, so that
whatever else the machine does hits both. They are some of those that a job would form of a slice
of the log, evenly spread from the shortest conversations to the longest. With `--data`: SmolLM2
with the shipped adapter on real conversations (the two logs `LOGS` in FOLDER, mixed), also
compared with what the method's reference code does: one conversation per forward pass of the whole
model that returns logits and all hidden states, which are copied to the host, role by role compared
with 20 directions of every matrix, whatever its rank, and looked at one direction after the other.
With `--shape 8b --lengths CSV`: a random model of Llama 3.1 8B's shape, made on the device, with
conversations as long as those of a trace. Prints a table and, as its last line, one JSON object.
"""

import argparse
import gzip
import json
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench import shapes
from pipeline.demo import assets
from schemas.records import Int32s, Role
from transforms import formats
from transforms.model import directions as artefacts
from transforms.model.batching import batches, default_tokens
from transforms.model.directions import Directions
from transforms.model.loading import context, load_tokenizer, load_trunk, placement
from transforms.model.memory import Rows
from transforms.model.roles import Tokens, tokenize
from transforms.model.trunk import Scorer
from transforms.tokenize import MAX_BATCH_ROWS

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "examples" / "badnet"
PER_MATRIX = 20
SLICE_RECORDS = 2000
LOGS = ("sharegpt_sample", "openai_chat_sample")
"""Long conversations of several turns, and questions with one answer each."""

Figures = dict[str, Any]
Reference = Callable[[Rows], object]
Statistics = tuple[float, float, float, float]


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
      trunk: the model up to its last monitored layer.
      directions: of every layer.
      timed: batches of conversations, as token ids and roles.
      lengths: of all conversations of the log, in its order; for the share of padding.
      batch_tokens: as `--batch-tokens`.
      reference: scores a batch the other way; None: not compared.
    """

    trunk: nn.Module
    directions: Directions
    timed: list[Rows]
    lengths: list[int]
    batch_tokens: int
    reference: Reference | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.trunk.parameters()).device


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the two logs")
    parser.add_argument("--shape", choices=list(shapes.SHAPES), help="a random model instead")
    parser.add_argument("--lengths", type=Path, help="CSV of a trace, for --shape")
    parser.add_argument("--batches", type=int, default=4, help="timed (4)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a conversation (1024)")
    parser.add_argument("--batch-tokens", type=int, help="as of the job")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    known = parser.parse_args(arguments)
    if (known.data is None) == (known.shape is None) or (known.shape and not known.lengths):
        parser.error("give --data, or --shape with --lengths")
    device, _ = placement(known.device, known.dtype)
    known.batch_tokens = known.batch_tokens or default_tokens(device)
    bench = _of_shape(known) if known.shape else _of_smollm2(known)
    figures = measure(bench, known.pairs)
    if known.shape:
        figures |= _use_of_device(bench, figures["tokens_per_s"])
    for name, value in figures.items():
        print(f"{name:<24}{value:>16}")
    print(json.dumps(figures))


def measure(bench: Bench, pairs: int) -> Figures:
    """Interleaved times of the scorer, the bare trunk and the reference; medians of ratios."""
    scorer = Scorer(bench.trunk, bench.directions, bench.batch_tokens)
    ways: dict[str, Reference] = {
        "scorer": lambda rows: _score(scorer, rows),
        "trunk": lambda rows: _forward(bench.trunk, rows, bench.device),
    }
    if bench.reference is not None:
        ways["reference"] = bench.reference
    _seconds(ways, bench.timed, bench.device)  # every shape has its kernels and memory then
    runs = []
    for _ in range(pairs):
        ways = dict(reversed(ways.items()))  # what runs first finds other caches
        runs.append(_seconds(ways, bench.timed, bench.device))
    tokens = sum(len(ids) for rows in bench.timed for ids, _ in rows)
    figures: Figures = {
        "device": _name(bench.device),
        "tokens": tokens,
        "batches": len(bench.timed),
    }
    figures["tokens_per_s"] = round(tokens / statistics.median(run["scorer"] for run in runs))
    for way in ways.keys() - {"scorer"}:
        ratios = [run[way] / run["scorer"] for run in runs]
        figures[f"ratio_to_{way}"] = round(statistics.median(ratios), 4)
        figures[f"ratio_to_{way}_lowest"] = round(min(ratios), 4)
    return figures | {"padding": _padding(bench), "peak_mb": _peak_mb(bench.device)}


def spread(rows: Rows, batch_tokens: int, count: int) -> list[Rows]:
    """Batches of the rows' first slice: as many as asked for, evenly spread, or all."""
    first = rows[:SLICE_RECORDS]
    found = list(batches([len(ids) for ids, _ in first], batch_tokens, MAX_BATCH_ROWS))
    places = (np.arange(min(count, len(found))) + 0.5) * max(len(found) / count, 1)
    return [[first[index] for index in found[int(place)]] for place in places]


def _seconds(
    ways: dict[str, Reference], batched: list[Rows], device: torch.device
) -> dict[str, float]:
    """Seconds each way takes for all batches; the ways take turns at every batch."""
    spent = dict.fromkeys(ways, 0.0)
    for number, rows in enumerate(batched):
        order = list(ways) if number % 2 else list(reversed(ways))
        for way in order:
            started = time.perf_counter()
            ways[way](rows)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent[way] += time.perf_counter() - started
    return spent


def _score(scorer: Scorer, rows: Rows) -> None:
    scorer.score([ids for ids, _ in rows], [roles for _, roles in rows])


def _forward(trunk: nn.Module, rows: Rows, device: torch.device) -> None:
    ids = np.zeros((len(rows), max(len(ids) for ids, _ in rows)), np.int64)
    for padded, (tokens, _) in zip(ids, rows, strict=True):
        padded[: len(tokens)] = tokens
    with torch.inference_mode():
        trunk(input_ids=torch.from_numpy(ids).to(device), use_cache=False)


def _padding(bench: Bench) -> float:
    """Share of padding in the batches of the whole log, read in slices."""
    padded = 0
    for start in range(0, len(bench.lengths), SLICE_RECORDS):
        part = bench.lengths[start : start + SLICE_RECORDS]
        for batch in batches(part, bench.batch_tokens, MAX_BATCH_ROWS):
            padded += len(batch) * part[batch[-1]]
    return round(1 - sum(bench.lengths) / padded, 4)


def _peak_mb(device: torch.device) -> int:
    """Most memory so far: allocated on the device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


# --- SmolLM2 on real conversations ----------------------------------------------------------------


def _of_smollm2(known: argparse.Namespace) -> Bench:
    base = assets.base_model(ROOT / "build" / "models" / "base")
    found = artefacts.compute_directions(base, ADAPTER, PER_MATRIX)
    trunk = load_trunk(base, ADAPTER, found.last_layer, known.device, known.dtype)
    log = _conversations(known.data, base, min(known.max_tokens, context(base)))
    lengths = [len(ids) for ids, _ in log]
    timed = spread(log, known.batch_tokens, known.batches)
    bench = Bench(trunk, found, timed, lengths, known.batch_tokens)
    # It keeps as many of every matrix; which they are makes no difference to the time.
    vectors = torch.randn(found.last_layer + 1, 2 * PER_MATRIX, found.vectors.shape[1])
    vectors /= vectors.norm(dim=-1, keepdim=True)
    dtype = next(trunk.parameters()).dtype
    return replace(bench, reference=_one_by_one(base, vectors, bench.device, dtype))


def _conversations(data: Path, base: Path, max_tokens: int) -> Rows:
    logs = (gzip.decompress((data / f"{name}.jsonl.gz").read_bytes()) for name in LOGS)
    lines = [line for log in logs for line in log.splitlines()]
    random.Random(0).shuffle(lines)  # a slice has some of either log
    parsed = [formats.parse(line).messages for line in lines]
    rows = tokenize(load_tokenizer(base, ADAPTER), parsed, max_tokens)
    return [(row.ids, row.roles) for row in rows if isinstance(row, Tokens)]


def _one_by_one(
    base: Path, vectors: Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[Rows], list[list[Statistics]]]:
    """One conversation at a time, in the steps of the method's reference code (see the module).

    `vectors` are the directions of every monitored layer, [layers, k, hidden].
    """
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(loaded, str(ADAPTER)).merge_and_unload()
    model = merged.to(device=device, dtype=dtype).eval()

    def statistics_of(tokens: Int32s, roles: NDArray[np.int8]) -> list[Statistics]:
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            stream = torch.stack([state[0] for state in states], dim=1).cpu().float()
            of_roles = (stream[torch.from_numpy(roles == role)] for role in Role)
            return [found for part in of_roles if len(part) for found in _all(part, vectors)]

    return lambda rows: [statistics_of(*row) for row in rows]


def _all(stream: Tensor, vectors: Tensor) -> list[Statistics]:
    """Lowest, highest, sum and sum of squares of every direction's cosines, one after the other.

    Args:
      stream: of a role's tokens behind the embedding and every layer, [tokens, layers + 1, hidden].
      vectors: of every monitored layer, [layers, k, hidden].
    """
    found = []
    for layer, directions in enumerate(vectors):
        state = stream[:, layer + 1]
        cosines = directions @ (state / state.norm(dim=-1, keepdim=True)).T
        ends = cosines.amin(dim=-1).tolist(), cosines.amax(dim=-1).tolist()
        sums = cosines.sum(dim=-1).tolist(), (cosines**2).sum(dim=-1).tolist()
        found += list(zip(*ends, *sums, strict=True))
    return found


# --- a random model of a given shape --------------------------------------------------------------


def _of_shape(known: argparse.Namespace) -> Bench:
    device, dtype = placement(known.device, known.dtype)
    trunk = shapes.trunk(known.shape, device, dtype)
    # Longer ones would go through the scorer in chunks, and through the bare trunk whole.
    sides = shapes.sides(known.lengths, known.batch_tokens)
    rows = shapes.conversations(known.shape, sides[:SLICE_RECORDS])
    timed = spread(rows, known.batch_tokens, known.batches)
    found = shapes.directions(known.shape, PER_MATRIX)
    return Bench(trunk, found, timed, list(map(sum, sides)), known.batch_tokens)


def _use_of_device(bench: Bench, tokens_per_s: float) -> Figures:
    """Which share of the device's own rate of matrix products the scorer reaches."""
    lengths = [len(ids) for rows in bench.timed for ids, _ in rows]
    rate = _matmul_rate(bench.device, next(bench.trunk.parameters()).dtype)
    reached = shapes.flop(bench.trunk, lengths) / sum(lengths) * tokens_per_s
    return {"matmul_tflops": round(rate / 1e12, 3), "share_of_matmul": round(reached / rate, 4)}


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second in a large square product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    times = [
        _seconds({"product": lambda _: matrix @ matrix}, [[]], device)["product"] for _ in range(10)
    ]
    return float(2 * size**3 / min(times))


if __name__ == "__main__":
    main()
