"""One job for two models of different directions, against an oracle run once for each.

The models are cheap scorers; the topic, tokenizer, graph, state and archive are real.
"""

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import oracle
import pyarrow.dataset as ds
import pytest
import traffic
from agreement import assert_ranges, exceedance_of, exceedances_of, row_of, row_of_verdict
from cheap_job import SETTINGS, CheapEngine, cheap_directions, cheap_job
from cheap_scorer import CheapScorer
from outcome import Outcome, Row, run

from pipeline.demo.broker import Broker
from pipeline.follow import Follow
from pipeline.job import Job, Model
from pipeline.learning import frozen
from pipeline.metrics import JobCollector
from pipeline.slices import Slices
from pipeline.state import State, ask, asked_acts, newest_commit
from pipeline.status import Status as StatusOfJob
from schemas.acts import Act, ActKind
from schemas.commit import Commit, Ledger, ModelState
from schemas.errors import ConfigurationError
from schemas.range_shift import RangeShift
from schemas.records import Status
from transforms.logs.times import EventTime
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges

EPOCH_MS = 30_000
RATE = 0.2
"""High, so that some of a hundred conversations of either model are flagged."""
SIZES = {"support": 7, "legal/v1": 4}
"""Directions by model."""

NAMES = {"support": "support", "legal/v1": "legal/v1", "legal": "legal/v1"}
"""What records say, to the model that is meant."""

OUTCOMES = ("clean", "flagged", "not_calibrated")
SAID = ["support"] * 6 + ["legal/v1", "legal", "legal", "unheard-of", None, 7]


@pytest.fixture(scope="module")
def said(conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conversations with a model field, or none."""
    chance = random.Random(11)
    named = ({**each, "model": chance.choice(SAID)} for each in conversations)
    return [{k: v for k, v in each.items() if v is not None} for each in named]


@pytest.fixture(scope="module")
def records(said: list[dict[str, Any]]) -> traffic.Records:
    return traffic.records(said)


@pytest.fixture(scope="module")
def topic(broker: Broker, records: traffic.Records) -> str:
    return traffic.to_topic(broker, "of-two-models", records) + "?end=latest"


def job_of(
    base: Path, log: str, out: Path, engine: Callable[..., Any] = CheapEngine, **changes: Any
) -> Job:
    models = []
    for name, size in SIZES.items():
        directions = cheap_directions(size)
        empty = Ranges.empty(size, directions.hash, name)
        logged_as = tuple(said for said, meant in NAMES.items() if meant == name)
        models.append(Model(name, engine(base, size), directions, empty, logged_as))
    settings = {
        "event_time": EventTime(traffic.TIME_FIELD),
        "epoch_ms": EPOCH_MS,
        "policy": make_policy("budget", PolicySettings(rate=RATE)),
        **changes,
    }
    return cheap_job(base, (log,), out, models=tuple(models), **settings)


def entries_of(model: str, records: traffic.Records, base: Path) -> list[oracle.Entry]:
    """What the oracle needs to know of the records: scored are the model's own only."""
    found = traffic.entries(records, CheapEngine(base, SIZES[model]))
    return [
        entry if NAMES.get(said_by(records, entry)) == model else replace(entry, segments=None)
        for entry in found
    ]


def said_by(records: traffic.Records, entry: oracle.Entry) -> Any:
    try:
        return json.loads(records[entry.partition][entry.offset]).get("model")
    except ValueError:
        return None


def test_two_models_in_small_and_large_slices_against_the_oracle(
    base_model: Path, topic: str, records: traffic.Records, tmp_path: Path
) -> None:
    large = run(job_of(base_model, topic, tmp_path / "l"), tmp_path / "state-l")
    for model, size in SIZES.items():
        memory = oracle.Memory.of(size)
        entries = entries_of(model, records, base_model)
        expected = oracle.judge_log(entries, EPOCH_MS, oracle.Rules("budget", rate=RATE), memory)
        assert_as_expected(large, model, expected)
        assert_ranges(large.by_model[model], memory)
    assert large.reasons() == {**traffic.DEAD, "unknown_model": unheard_of(records)}

    job = job_of(base_model, topic, tmp_path / "s", slice_records=40)
    small = run(job, tmp_path / "state-s")
    assert small.commit.number > 10 > large.commit.number
    assert small.files() == large.files()
    assert small.alerts() == large.alerts()
    assert hashes(small) == hashes(large)
    assert small.commit.models == large.commit.models


def unheard_of(records: traffic.Records) -> int:
    found = Counter(
        each["model"] if isinstance(each.get("model"), str) else None
        for values in records
        for value in values
        if value.startswith(b'{"id"')
        for each in [json.loads(value)]
    )
    return sum(count for name, count in found.items() if name not in NAMES)


def hashes(found: Outcome) -> dict[str, str]:
    return {model: ranges.hash for model, ranges in found.by_model.items()}


def assert_as_expected(found: Outcome, model: str, expected: list[oracle.Verdict]) -> None:
    statuses = Counter(verdict.judgement.status for verdict in expected)
    assert set(statuses) == set(Status), "the log has something of everything"
    ledger = found.commit.models[model].ledger
    assert (ledger.scored, ledger.flagged) == (len(expected), statuses[Status.FLAGGED])
    assert ledger.uncalibrated == statuses[Status.UNCALIBRATED]
    expected = sorted(expected, key=lambda v: (v.entry.partition, v.entry.offset))
    rows = [row for row in found.rows("conversations") if row["model"] == model]
    assert [row_of(row) for row in rows] == [row_of_verdict(verdict) for verdict in expected]
    exceedances = [row for row in found.rows("exceedances") if row["model"] == model]
    outside = sorted(each for verdict in expected for each in exceedances_of(verdict))
    assert sorted(map(exceedance_of, exceedances)) == outside
    flagged = [v.entry for v in expected if v.judgement.status is Status.FLAGGED]
    about = [alert["resources"] for alert in found.alerts()]
    data = [talk["data"] for talk, named in about if named["name"] == model]
    places = sorted((each["partition"], each["offset"]) for each in data)
    assert places == sorted((entry.partition, entry.offset) for entry in flagged)


def test_epochs_close_for_a_model_that_has_fallen_silent_too(
    base_model: Path, conversations: list[dict[str, Any]], tmp_path: Path
) -> None:
    names = ["legal", "support"] * 10 + ["support"] * 160
    talks = [{**each, "model": name} for each, name in zip(conversations, names, strict=False)]
    log = traffic.to_files(tmp_path / "log", traffic.records(talks))
    found = []
    for records in (2000, 60):
        out = tmp_path / str(records)
        job = job_of(base_model, log, out, slice_records=records, epoch_ms=10_000)
        found.append(run(job, tmp_path / f"state-{records}"))
    large, small = found
    assert small.commit.number > large.commit.number
    assert small.files() == large.files() != {}
    epochs = [{row["epoch"] for row in rows_of(small, "ranges", model)} for model in SIZES]
    assert len(epochs[0]) > 8
    assert epochs[0] == epochs[1]


def rows_of(found: Outcome, table: str, model: str) -> list[Row]:
    files = map(
        str, (found.job.archive / table / f"model={quote(model, safe='')}").rglob("*.parquet")
    )
    return ds.dataset(list(files), partitioning="hive").to_table().to_pylist()


def test_a_model_that_is_new_begins_anew_and_one_that_is_gone_is_kept(
    base_model: Path, said: list[dict[str, Any]], tmp_path: Path
) -> None:
    log = traffic.to_files(tmp_path / "log", traffic.records(said[:60]))
    both = job_of(base_model, log, tmp_path / "out")
    before = run(both, tmp_path / "state")
    support, legal = both.models
    new = replace(legal, name="new", logged_as=("new",))
    state = State(tmp_path / "state")
    slices = Slices(replace(both, models=(support, new)), state)
    assert list(slices.ranges()) == ["support", "new"]
    assert slices.ranges()["support"].hash == before.by_model["support"].hash
    assert slices.ranges()["new"].hash == legal.base_ranges.emptied().hash
    assert slices.commit.models["legal/v1"] == before.commit.models["legal/v1"]
    with pytest.raises(ConfigurationError, match="other directions for support"):
        Slices(replace(both, models=(replace(new, name="support"), legal)), state)
    state.close()


def test_a_model_that_is_gone_is_told_of_once_and_what_is_asked_for_it_waits(
    base_model: Path, said: list[dict[str, Any]], tmp_path: Path
) -> None:
    log = traffic.to_files(tmp_path / "log", traffic.records(said[:150]))
    both = job_of(base_model, log, tmp_path / "out", slice_records=25)
    state = State(tmp_path / "state")
    begun = Slices(both, state)
    while len(begun.commit.models["support"].generations) == 0:
        assert begun.step()
    news = RangeShift("7" * 64, "legal/v1", "d" * 64, "budget/3", RATE, 1, 2, 100, 50, 7)
    legal = replace(begun.commit.models["legal/v1"], news=(news,))
    models = {**begun.commit.models, "legal/v1": legal}
    state.write_commit(replace(begun.commit, models=models))
    ask(state.root, Act("1-freeze", ActKind.FREEZE, "legal/v1", "ann", 1, "because"))

    support = replace(both, models=both.models[:1], slice_records=2000)
    slices = Slices(support, state)
    before = slices.commit.closed_epoch
    assert told(support) == [news.id], "it may not have been told before a crash"
    assert slices.step()
    assert slices.commit.closed_epoch is not None and before is not None
    assert slices.commit.closed_epoch > before + 1, "no act holds it to an epoch a slice"
    Slices(support, state)
    assert told(support) == [news.id]
    assert not slices.commit.done
    assert not frozen(Slices(both, state).commit.models["legal/v1"].acts)
    assert [act.id for act in asked_acts(state.root)] == ["1-freeze"], "it waits"
    assert Slices(both, state)._waiting() == asked_acts(state.root)
    state.close()


def told(job: Job) -> list[str]:
    """Ids of the shifts that were sent."""
    events = [json.loads(line) for line in Path(job.alerts).read_text().splitlines()]
    return [each["metadata"]["uid"] for each in events if each["unmapped"].get("event")]


def test_an_act_is_of_the_model_it_names_or_of_the_only_one_where_that_was_renamed() -> None:
    held = {name: ModelState("r", "o") for name in ("a", "b")}
    commit = Commit(1, "c", (), 7, held, Ledger(), Ledger(), {}, {})
    by_name = {
        name: Act(name, ActKind.FREEZE, name, "ann", 1, "because") for name in ("a", "b", "former")
    }
    for judged, expected in (
        (["a", "b"], ["a", "b", None]),
        (["a"], ["a", None, "a"]),
    ):
        found = [commit.concerned(by_name[name], judged) for name in ("a", "b", "former")]
        assert found == expected


def test_status_and_metrics_say_it_of_each_model(
    base_model: Path, said: list[dict[str, Any]], tmp_path: Path
) -> None:
    log = traffic.to_files(tmp_path / "log", traffic.records(said[:200]))
    policy = make_policy("range", replace(SETTINGS, min_calibration=65))
    job = job_of(base_model, log, tmp_path / "out", policy=policy)
    state, loop = State(tmp_path / "state"), Follow(False, 1)
    state.describe(job.description())
    commit = loop.run(lambda: Slices(job, state))
    state.close()
    text = "\n".join(StatusOfJob.of(tmp_path / "state").lines())
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in JobCollector(job, loop.health).collect()
        for sample in family.samples
    }
    assert text.startswith("legal/v1, support: policy range")
    user = {name: each[0] for name, each in loop.health.missing.items()}
    assert user["support"] == 0
    assert user["legal/v1"] > 0
    for name, said_of in (("support", "calibrated"), ("legal/v1", "NOT calibrated yet")):
        assert f"{name}, user: {said_of}, ranges of " in text
        assert values["deltawatch_calibrated", name, "user"] == (said_of == "calibrated")
        ledger = commit.models[name].ledger
        judged = ledger.scored - ledger.uncalibrated
        assert f"{name}: flagged {ledger.flagged} of {judged} judged" in text
        of_model = [values["deltawatch_conversations_total", name, each] for each in OUTCOMES]
        assert of_model == [judged - ledger.flagged, ledger.flagged, ledger.uncalibrated]
    assert sum(each.ledger.scored for each in commit.models.values()) == commit.total_ledger.scored


@dataclass(frozen=True, repr=False)
class DeadlyEngine(CheapEngine):
    """Kills its process at the first batch of a model, once."""

    def __repr__(self) -> str:
        """Be taken for the harmless one: a restart goes on under the same configuration."""
        return f"CheapEngine({self.base}, {self.directions})"

    def scorer(self) -> CheapScorer:
        """Deadly for the model with fewer directions, until there is a mark."""
        return DeadlyScorer(self.directions) if self.directions == 4 else super().scorer()


class DeadlyScorer(CheapScorer):
    """Leaves a mark where the process was killed."""

    def score(self, *batch: Any) -> Any:
        """Score, or die."""
        mark = Path(os.environ["KILLED"])
        if mark.parent.joinpath("state/commits/00000002.json").exists() and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(*batch)


def test_a_kill_between_two_models_changes_nothing(
    base_model: Path,
    said: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    log = traffic.to_files(tmp_path / "log", traffic.records(said[:120]))
    job = job_of(base_model, log, tmp_path / "out", DeadlyEngine, slice_records=30)
    state = tmp_path / "state"
    process = multiprocessing.get_context("spawn").Process(target=run, args=(job, state))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed").exists()
    commit = newest_commit(state)
    assert commit is not None
    assert (state / "plan.json").exists()
    went_on = run(job, state)
    assert went_on.commit.number > commit.number == 2

    undisturbed = run(replace(job, **outputs(tmp_path / "undisturbed")), tmp_path / "state-u")
    assert went_on.files() == undisturbed.files() != {}
    assert hashes(went_on) == hashes(undisturbed)
    assert went_on.commit.models == undisturbed.commit.models
    assert went_on.commit.total_ledger == undisturbed.commit.total_ledger
    uids = {alert["metadata"]["uid"] for alert in undisturbed.alerts()}
    assert {alert["metadata"]["uid"] for alert in went_on.alerts()} == uids


def outputs(out: Path) -> dict[str, Any]:
    return {
        "archive": out / "archive",
        "alerts": str(out / "alerts.jsonl"),
        "dead_letters": str(out / "dead_letters.jsonl"),
    }
