"""Jobs whose model is the cheap scorer: real logs, tokenizer, graph, state and outputs."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from cheap_scorer import CheapScorer

from pipeline.job import Job, Model
from transforms.logs.times import EventTime
from transforms.model.directions import DirectionEntry, Directions, Manifest
from transforms.model.loading import load_tokenizer
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges

DIRECTIONS = 7
MODEL = "a-model"
MAX_TOKENS = 160

SETTINGS = PolicySettings(rate=0.05, percentile=95, min_calibration=30, eps=0.01)
"""What `oracle.Rules` has as its defaults."""


@dataclass(frozen=True)
class CheapEngine:
    """The real tokenizer and a scorer that costs nothing."""

    base: Path
    directions: int = DIRECTIONS

    def tokenizer(self) -> Any:
        """The real one, loaded once per process."""
        return _tokenizer(self.base)

    @property
    def vocabulary(self) -> int:
        """No embedding, no limit."""
        return 2**31

    def scorer(self) -> CheapScorer:
        """Scores by a hash of the tokens."""
        return CheapScorer(self.directions)


@lru_cache
def _tokenizer(base: Path) -> Any:
    return load_tokenizer(base, base)


def cheap_directions(count: int = DIRECTIONS) -> Directions:
    """An artefact that names directions and holds none."""
    entries = tuple(DirectionEntry(f"O{i}_u0", i, "o_proj", 0, 1.0) for i in range(count))
    manifest = Manifest(MODEL, {}, {}, "", "", {}, 1, count, 1, 0, "", "")
    return Directions(np.ones((count, 1), np.float32), entries, manifest)


def cheap_job(base: Path, inputs: tuple[str, ...], out: Path, **changes: Any) -> Job:
    """A job of one model on `inputs` that leaves everything in `out`.

    `changes` replace attributes of `Job` and, by the names `engine`, `model`, `directions` and
    `base_ranges`, of its model.
    """
    directions = cheap_directions()
    empty = Ranges.empty(DIRECTIONS, directions.hash, MODEL)
    model = Model(
        changes.pop("model", MODEL),
        changes.pop("engine", CheapEngine(base)),
        changes.pop("directions", directions),
        changes.pop("base_ranges", empty),
    )
    settings: dict[str, Any] = {
        "inputs": inputs,
        "event_time": EventTime(None),
        "epoch_ms": 60_000,
        "models": (model,),
        "policy": make_policy("budget", SETTINGS),
        "archive": out / "archive",
        "alerts": str(out / "alerts.jsonl"),
        "dead_letters": str(out / "dead_letters.jsonl"),
        "max_tokens": MAX_TOKENS,
    }
    return Job(**{**settings, **changes})
