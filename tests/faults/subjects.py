"""What is disturbed: jobs with the cheap scorer on many records, or with the real LLM on some."""

import itertools
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import traffic
from cheap_job import MAX_TOKENS, CheapEngine

from pipeline.demo import planted
from pipeline.demo.assets import base_model, sharegpt
from transforms.model import directions as artefacts
from transforms.model.engine import TrunkEngine
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.snapshots import load_snapshot

ROOT = Path(__file__).parents[2]
BUILD, EXAMPLES = ROOT / "build", ROOT / "examples"
CALIBRATION = 150
"""Conversations of each partition that the cheap scorer's ranges are made of."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Subject:
    """A log and what judges it.

    Attributes:
      base: folder of the model whose tokenizer is used.
      conversations: how many the log holds.
      records: of the log.
      changes: attributes of the job that are not the cheap one's.
      paced: whether slices are sized by speed. Not for the LLM: another batch may round another
        way, so what is compared byte for byte must be sliced alike.
    """

    base: Path
    conversations: int
    records: traffic.Records
    changes: dict[str, Any]
    paced: bool


def cheap(_: Path, conversations: int) -> Subject:
    """Scores are a hash of the tokens."""
    base = _apart(base_model, BUILD / "models" / "base")
    records = traffic.records(real(conversations))
    first = traffic.entries([part[:CALIBRATION] for part in records], CheapEngine(base))
    changes = {"base_ranges": traffic.snapshot(first), "slice_records": 500}
    return Subject(base, conversations, records, changes, paced=True)


def llm(folder: Path, conversations: int) -> Subject:
    """The real model with the planted backdoor, and conversations that use it."""
    base = _apart(base_model, BUILD / "models" / "base")
    adapter, out = EXAMPLES / "badnet", folder / "directions"
    _apart(_directions, base, adapter, out)
    triggered = _apart(planted.planted, base, EXAMPLES, BUILD)
    mixed = real(conversations - len(triggered)) + triggered
    random.Random(5).shuffle(mixed)
    artefact = artefacts.load(out)
    changes = {
        "engine": TrunkEngine(base, adapter, out, "cpu"),
        "model": artefact.manifest.model_name,
        "directions": artefact,
        "policy": make_policy("budget", PolicySettings()),
        "base_ranges": load_snapshot(EXAMPLES / "ranges", artefact.hash),
        "max_tokens": MAX_TOKENS,
        "slice_records": 25,
    }
    return Subject(base, conversations, traffic.records(mixed), changes, paced=False)


SUBJECTS: dict[str, Callable[[Path, int], Subject]] = {"cheap": cheap, "llm": llm}


def real(count: int) -> list[dict[str, Any]]:
    """Real conversations; once there are no more of them, the same under other ids."""
    found = list(sharegpt(0, count))
    numbered = enumerate(itertools.islice(itertools.cycle(found), count))
    return [{**each, "id": f"{each['id']}/{n // len(found)}"} for n, each in numbered]


def _directions(base: Path, adapter: Path, out: Path) -> None:
    artefacts.save(artefacts.compute_directions(base, adapter), out)


def _apart(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call where torch's threads may start: jobs are forked, and threads do not survive that."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
