"""What adapters over a shared base cost beside a merged one: `python bench/adapters.py`.

SmolLM2 with the shipped adapter merged, and the same adapter twice, as two models that share the
base. The same batches of real conversations go through either, in turns. Also timed: going from one
model to the other, and what could be in its place, merging an adapter into the base and taking it
out again. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This file's folder, which Python puts first, would hide the package `pipeline`.
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from bench.scorer import ADAPTER, ROOT, Reference, _score, _seconds
from pipeline.demo import assets
from transforms import formats
from transforms.model import loading
from transforms.model.batching import batches
from transforms.model.directions import compute_directions
from transforms.model.memory import Rows
from transforms.model.roles import Tokens, tokenize
from transforms.model.shared import Switch
from transforms.model.trunk import Scorer
from transforms.tokenize import MAX_BATCH_ROWS

Figures = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=16, help="timed (16)")
    parser.add_argument("--max-tokens", type=int, default=160, help="of a conversation (160)")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    known = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        again = shutil.copytree(ADAPTER, Path(folder, "again"))  # the same folder is loaded once
        figures = _measure(known, ((ADAPTER,), (again,)))
    for name, value in figures.items():
        print(f"{name:<28}{value:>12}")
    print(json.dumps(figures))


def _measure(known: argparse.Namespace, tuned: Sequence[Sequence[Path]]) -> Figures:
    base = assets.base_model(ROOT / "build" / "models" / "base")
    found = compute_directions(base, ADAPTER)
    place = (found.last_layer, known.device, known.dtype)
    merged = loading.load_trunk(base, ADAPTER, *place)
    shared, names = loading.load_shared_trunk(base, tuned, *place)
    switch = Switch(shared)
    with switch.on(names[0]):
        pass  # stays on
    scorers = {"merged": Scorer(merged, found), "shared": Scorer(shared, found)}
    figures = _speeds(scorers, _batched(known, base), known.pairs)
    return figures | {"switch_ms": round(_switching(switch, names), 2)} | _merging(shared)


def _speeds(scorers: Mapping[str, Scorer], batched: list[Rows], pairs: int) -> Figures:
    ways: dict[str, Reference] = {name: partial(_score, scorer) for name, scorer in scorers.items()}
    device = scorers["shared"]._device
    _seconds(ways, batched[:1], device)
    runs = [_seconds(ways, batched, device) for _ in range(pairs)]
    tokens = sum(len(ids) for rows in batched for ids, _ in rows)
    figures: Figures = {"tokens": tokens, "batches": len(batched)}
    for way in ways:
        seconds = statistics.median(run[way] for run in runs)
        figures[f"{way}_tokens_per_s"] = round(tokens / seconds)
    found = [_steps(scorer, batched) for scorer in scorers.values()]
    apart = np.abs(found[0] - found[1])
    ratios = sorted(run["merged"] / run["shared"] for run in runs)
    return figures | {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_lowest": round(ratios[0], 3),
        "steps_apart": round(float(apart.mean()), 2),
        "steps_apart_most": int(apart.max()),
    }


def _steps(scorer: Scorer, batched: list[Rows]) -> NDArray[np.int64]:
    """Lowest and highest cosines of all batches."""
    scored = [scorer.score([ids for ids, _ in rows], [r for _, r in rows])[0] for rows in batched]
    return np.vstack([np.hstack([each.low, each.high]) for each in scored]).astype(np.int64)


def _batched(known: argparse.Namespace, base: Path) -> list[Rows]:
    """Real conversations in the batches a job would form."""
    log = (json.dumps(each).encode() for each in assets.sharegpt(0, known.records))
    messages = [formats.parse(line).messages for line in log]
    made = tokenize(loading.load_tokenizer(base, ADAPTER), messages, known.max_tokens)
    rows = [(row.ids, row.roles) for row in made if isinstance(row, Tokens)]
    found = batches([len(ids) for ids, _ in rows], known.batch_tokens, MAX_BATCH_ROWS)
    return [[rows[index] for index in batch] for batch in found]


def _switching(switch: Switch, names: Sequence[Sequence[str]]) -> float:
    """Milliseconds from one model to the other."""

    def there_and_back() -> None:
        for each in reversed(names):
            with switch.on(each):
                pass

    return _milliseconds(there_and_back) / len(names)


def _merging(trunk: nn.Module) -> Figures:
    """Merge in place and take out again: how long that takes, and what it leaves behind."""
    layers: list[Any] = [each for each in trunk.modules() if isinstance(each, BaseTunerLayer)]
    before = [layer.get_base_layer().weight.clone() for layer in layers]

    def in_and_out() -> None:
        for layer in layers:
            layer.merge(adapter_names=["0"])
            layer.unmerge()

    with torch.inference_mode():
        spent = _milliseconds(in_and_out)
    after = [layer.get_base_layer().weight for layer in layers]
    changed = sum(int(torch.ne(*pair).sum()) for pair in zip(after, before, strict=True))
    share = changed / sum(weight.numel() for weight in before)
    return {"merge_and_unmerge_ms": round(spent, 1), "weights_changed": round(share, 4)}


def _milliseconds(action: Callable[[], None], times: int = 5) -> float:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return 1000 * statistics.median(spent)


if __name__ == "__main__":
    main()
