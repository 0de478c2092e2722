"""What everything around the model costs: `python bench/pipeline.py`.

A topic on a real broker, real conversations, the whole job of `watch`: read, decode, score, judge,
alerts, archive, commits. Once with a stub that takes 10 ms a record, as a GPU would, and once with
the real LLM. Each run of the job is followed by the same batches through the scorer alone, five
pairs of each; what is printed are medians. Prints a table and, as its last line, one JSON object.

`ms_per_record` is what a run takes longer than its batches alone. Where the machine's speed wanders
by more than that, `ms_outside` says how long the run was not in the scorer.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from kafka import KafkaProducer
from numpy.typing import NDArray

from pipeline import log_lines
from pipeline.demo import assets
from pipeline.demo.broker import Broker
from pipeline.job import Job, Model
from pipeline.slices import Slices
from pipeline.state import State
from schemas.records import Int32s, Segments
from transforms.logs.times import EventTime
from transforms.model import directions as artefacts
from transforms.model import loading
from transforms.model.directions import Directions
from transforms.model.engine import Engine, ScoresBatches, TrunkEngine
from transforms.model.loading import load_tokenizer
from transforms.model.segments import cut
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.snapshots import load_snapshot

ROOT = Path(__file__).parents[1]
BUILD, ADAPTER = ROOT / "build", ROOT / "examples" / "badnet"
STUB_MS = 10.0
PARTITIONS = 4
Batch = tuple[list[Int32s], list[NDArray[np.int8]]]


@dataclass
class Recording:
    """Passes batches on to a scorer and keeps them.

    Attributes:
      scorer: what scores.
      batches: all so far.
      seconds: that the scorer took for them.
    """

    scorer: ScoresBatches
    batches: list[Batch] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """The scorer's."""
        return self.scorer.nbytes

    def score(
        self, token_ids: list[Int32s], roles: list[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Score like the scorer."""
        self.batches.append((token_ids, roles))
        started = time.perf_counter()
        scores = self.scorer.score(token_ids, roles)
        self.seconds += time.perf_counter() - started
        return scores


class Pair(NamedTuple):
    """Seconds of one run of the job, of its scorer in it, and of the same batches alone."""

    whole: float
    within: float
    alone: float


class Stub:
    """Takes its time and gives every segment the same cosines; costs little CPU."""

    def __init__(self, directions: int) -> None:
        self._steps = np.arange(directions, dtype=np.int16)

    @property
    def nbytes(self) -> int:
        """It has no weights."""
        return 0

    def score(
        self, token_ids: list[Int32s], roles: list[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Sleep, then hand out what a scorer would."""
        time.sleep(STUB_MS / 1000 * len(token_ids))
        where = cut(roles)
        steps = np.tile(self._steps, (len(where), 1))
        places = np.zeros(steps.shape, np.uint8)
        segments = Segments(
            len(token_ids),
            where.row.astype(np.int32),
            where.role,
            where.start.astype(np.uint32),
            (where.end - where.start).astype(np.uint8),
            -steps,
            steps,
            places,
            places,
        )
        return segments, np.ones(len(token_ids), np.bool_)


@dataclass(frozen=True)
class BenchEngine:
    """The real tokenizer with one of the two scorers; `kind` is "stub" or "llm"."""

    base: Path
    directions: Path
    kind: str

    def tokenizer(self) -> Any:
        """The real one."""
        return _tokenizer(self.base)

    @property
    def vocabulary(self) -> int:
        """The model's."""
        return loading.vocabulary(self.base)

    def scorer(self) -> Recording:
        """One per process."""
        return _scorer(self)


@lru_cache
def _tokenizer(base: Path) -> Any:
    return load_tokenizer(base, ADAPTER)


@lru_cache
def _scorer(engine: BenchEngine) -> Recording:
    trunk = TrunkEngine(engine.base, ADAPTER, engine.directions)
    stub = engine.kind == "stub"
    return Recording(Stub(len(trunk.artefact)) if stub else trunk.scorer())


@dataclass(frozen=True)
class Bench:
    """What both scorers run on."""

    folder: Path
    broker: Broker
    base: Path
    directions: Directions

    def topic(self, name: str, conversations: Sequence[bytes]) -> str:
        """A topic that holds conversations; its URI."""
        self.broker.create_topic(name, PARTITIONS)
        with closing(KafkaProducer(bootstrap_servers=self.broker.bootstrap)) as producer:
            for number, value in enumerate(conversations):
                producer.send(name, value, partition=number % PARTITIONS)
        return f"kafka://{self.broker.bootstrap}/{name}"

    def job(self, name: str, topic: str, engine: Engine, max_tokens: int | None) -> Job:
        """A job that leaves everything in a folder and on topics of its own."""
        sinks = {part: f"{name}-{part}" for part in ("alerts", "dead")}
        for sink in sinks.values():
            self.broker.create_topic(sink)
        ranges = load_snapshot(ROOT / "examples" / "ranges", self.directions.hash)
        return Job(
            inputs=(topic,),
            event_time=EventTime(None),
            epoch_ms=600_000,
            models=(Model(self.directions.manifest.model_name, engine, self.directions, ranges),),
            policy=make_policy("budget", PolicySettings()),
            archive=self.folder / name,
            alerts=f"kafka://{self.broker.bootstrap}/{sinks['alerts']}",
            dead_letters=f"kafka://{self.broker.bootstrap}/{sinks['dead']}",
            max_tokens=max_tokens,
        )


def main() -> None:
    """Run everything and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=2000, help="for the stub (2000)")
    parser.add_argument("--llm-records", type=int, default=2000, help="for the LLM (2000)")
    parser.add_argument("--llm-tokens", type=int, default=16, help="of each, for the LLM (16)")
    parser.add_argument("--bytes", type=int, default=2000, help="of a record, at most (2000)")
    parser.add_argument("--pairs", type=int, default=5)
    known = parser.parse_args()
    log_lines.configure("text")
    with _bench() as bench:
        stub = _measure(bench, "stub", known.records, known.bytes, None, known.pairs)
        llm = _measure(bench, "llm", known.llm_records, known.bytes, known.llm_tokens, known.pairs)
    _print_table({"stub": stub, "llm": llm})
    print(json.dumps({"ratio": stub["ratio"], "ms_per_record": stub["ms_per_record"], "llm": llm}))


@contextmanager
def _bench() -> Iterator[Bench]:
    base = assets.base_model(BUILD / "models" / "base")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        found = artefacts.compute_directions(base, ADAPTER)
        artefacts.save(found, Path(name, "directions"))
        with Broker(Path(name, "broker"), BUILD / "kafka" / "jars") as broker:
            yield Bench(Path(name), broker, base, found)


def _measure(
    bench: Bench, kind: str, records: int, size: int, max_tokens: int | None, pairs: int
) -> dict[str, float]:
    topic = bench.topic(kind, list(_short_conversations(records, size)))
    engine = BenchEngine(bench.base, bench.folder / "directions", kind)
    recording, measured = engine.scorer(), []
    for pair in range(pairs + 1):
        recording.batches.clear()
        recording.seconds = 0.0
        job = bench.job(f"{kind}-{pair}", topic, engine, max_tokens)
        whole = _seconds(partial(_run, job))
        within = recording.seconds
        measured.append(Pair(whole, within, _seconds(partial(_alone, recording))))
    scored = sum(len(ids) for ids, _ in recording.batches)
    tokens = sum(len(ids) for batch, _ in recording.batches for ids in batch)
    assert scored == records, f"{scored} of {records} records were scored"
    return _figures(measured[1:], records, tokens)  # the first pair has imports and caches to fill


def _figures(pairs: Sequence[Pair], records: int, tokens: int) -> dict[str, float]:
    whole = statistics.median(pair.whole for pair in pairs)
    alone = statistics.median(pair.alone for pair in pairs)
    ratios = [pair.alone / pair.whole for pair in pairs]
    overheads = [(pair.whole - pair.alone) / records * 1000 for pair in pairs]
    outside = [(pair.whole - pair.within) / records * 1000 for pair in pairs]
    return {
        "records": records,
        "tokens_per_record": round(tokens / records, 1),
        "alone_tokens_per_s": round(tokens / alone),
        "job_tokens_per_s": round(tokens / whole),
        "ratio": round(statistics.median(ratios), 4),
        "lowest": round(min(ratios), 4),
        "ms_per_record": round(statistics.median(overheads), 3),
        "ms_outside": round(statistics.median(outside), 3),
    }


def _run(job: Job) -> None:
    with tempfile.TemporaryDirectory(prefix="state-") as name:
        state = State(Path(name))
        slices = Slices(job, state)
        while slices.step():
            pass
        state.close()


def _alone(recording: Recording) -> None:
    for token_ids, roles in recording.batches:
        recording.scorer.score(token_ids, roles)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _short_conversations(count: int, size: int) -> Iterator[bytes]:
    """Beginnings of real conversations that make records of at most `size` bytes."""
    for each in assets.sharegpt(0, count):
        turns: list[dict[str, str]] = []
        for turn in each["conversations"]:
            left = size - len(json.dumps(turns)) - 100
            turns.append({**turn, "value": turn["value"][: max(left, 1)]})
            if left < len(turn["value"]):
                break
        yield json.dumps({"id": each["id"], "conversations": turns}).encode()


def _print_table(measured: dict[str, dict[str, float]]) -> None:
    columns = list(measured["stub"])
    print(f"{'scorer':<8}" + "".join(f"{column:>20}" for column in columns))
    for name, figures in measured.items():
        print(f"{name:<8}" + "".join(f"{figures[column]:>20,}" for column in columns))


if __name__ == "__main__":
    main()
