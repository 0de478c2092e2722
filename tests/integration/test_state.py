"""State directories: gone on with by later versions, read while they are in use, never shared."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import outcome
import pyarrow.dataset as ds
import pytest
from cheap_job import SETTINGS, cheap_job
from kafka import KafkaProducer

from pipeline import publish
from pipeline.demo.broker import Broker
from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State
from pipeline.status import Status
from schemas.arrow import SEGMENT_COLUMNS
from schemas.commit import FORMAT, Commit
from schemas.errors import ConfigurationError
from transforms.logs.times import EventTime
from transforms.ranges.policies import make_policy

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONVERSATIONS, BROKEN = 24, 1
GOOD = b'{"messages": [{"role": "user", "content": "Hello"}]}'


@pytest.fixture(params=["state_1", "state_2"])
def each_old(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with what an older version left; the current one."""
    folder = shutil.copytree(FIXTURES / request.param, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the last version before models had names left."""
    folder = shutil.copytree(FIXTURES / "state_2", tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def job(base_model: Path, out: str) -> Job:
    log = ("log.jsonl",)
    return cheap_job(base_model, log, Path(out), event_time=EventTime("at"), slice_records=10)


def test_a_state_of_a_former_format_is_gone_on_with(each_old: Path, base_model: Path) -> None:
    old = each_old
    went_on = outcome.run(job(base_model, "out"), old / "state")
    anew = outcome.run(job(base_model, "anew"), old / "anew-state")
    assert [without_segments(row) for row in rows(went_on)] == [
        without_segments(row) for row in rows(anew)
    ]
    assert len(rows(anew)) == CONVERSATIONS
    later = [
        (one, two)
        for one, two in zip(rows(went_on), rows(anew), strict=True)
        if one["segment_role"]
    ]
    former = CONVERSATIONS - len(later)
    assert 0 < former <= 10, "of the first slice"
    assert all(one == two for one, two in later)
    assert went_on.commit.total_ledger == anew.commit.total_ledger
    assert went_on.commit.models.keys() == anew.commit.models.keys()
    assert went_on.ranges.without_segments == former
    mine, theirs = went_on.ranges.conversations.to_arrays(), anew.ranges.conversations.to_arrays()
    assert mine["stretches"].tolist() == theirs["stretches"].tolist()
    assert mine["total"] == theirs["total"]
    assert went_on.commit.reasons == {"bad_json": BROKEN}
    assert not list((old / "state/pending").iterdir())


def rows(found: outcome.Outcome) -> list[outcome.Row]:
    """Without the hash of the ranges, which the older version made otherwise."""
    return [{**row, "ranges_hash": None} for row in found.rows("conversations")]


def without_segments(row: outcome.Row) -> outcome.Row:
    """Without what the older version did not keep, and what it scored otherwise."""
    made_up = {"low", "high", "policy", "score", "role", *SEGMENT_COLUMNS}
    return {name: value for name, value in row.items() if name not in made_up}


@pytest.mark.parametrize(
    ("change", "words"), [({"format": FORMAT + 1}, f"newer than {FORMAT}"), ({"more": 1}, "more")]
)
def test_a_commit_of_a_later_version_is_refused_in_one_line(
    old: Path, base_model: Path, change: dict[str, int], words: str
) -> None:
    path = old / "state/commits/00000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigurationError, match=words) as caught:
        Slices(job(base_model, "out"), State(old / "state"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": ("other.jsonl",)}, r"has begun to read file://log\.jsonl.* as --input again"),
        ({"epoch_ms": 7_000}, "numbers its epochs by --epoch 60s; give that length"),
        ({"max_tokens": 90}, "has ranges of 160 tokens; give --max-tokens 160"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_in_one_line(
    old: Path, base_model: Path, change: dict[str, Any], words: str
) -> None:
    before = replace(job(base_model, "out"), epoch_ms=60_000)
    shutil.copy("log.jsonl", "other.jsonl")
    state = State(old / "new-state")
    Slices(before, state).step()
    with pytest.raises(ConfigurationError, match=words) as caught:
        Slices(replace(before, **change), state)
    assert "\n" not in str(caught.value)
    Slices(replace(before, inputs=(*before.inputs, "other.jsonl")), state)
    state.close()


def test_ranges_that_would_not_be_used_are_refused(old: Path, base_model: Path) -> None:
    before = job(base_model, "out")
    state = State(old / "new-state")
    slices = Slices(before, state)
    while slices.step():
        pass
    learned = replace(before.models[0], base_ranges=slices.ranges()[before.models[0].name])
    with pytest.raises(ConfigurationError, match="began without these --ranges for a-model"):
        Slices(replace(before, models=(learned,)), state)
    state.close()
    given = State(old / "another-state")
    Slices(replace(before, models=(learned,)), given).step()
    Slices(before, given)
    given.close()


def test_archiving_gone_on_with_under_other_options_shows_every_row_once(
    old: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies when an epoch's files are in the archive, before the pending ones are gone."""
    before = job(base_model, "out")
    state, kept = State(old / "new-state"), old / "kept"
    finish_epochs = publish.finish_epochs

    def finish(job: Job, state: State, commit: Commit) -> None:
        shutil.copytree(state.root / "pending", kept, dirs_exist_ok=True)
        finish_epochs(job, state, commit)

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.slices.publish.finish_epochs", finish)
        slices = Slices(before, state)
        while not slices.commit.to_archive:
            slices.step()
    once = outcome.Outcome(before, slices.commit, slices.ranges()).rows("conversations")
    shutil.copytree(kept, old / "new-state/pending", dirs_exist_ok=True)
    other = replace(before, policy=make_policy("range", SETTINGS))
    again = Slices(other, state)
    assert outcome.Outcome(other, again.commit, again.ranges()).rows("conversations") == once
    assert once
    state.close()


def test_a_topic_is_begun_once_where_only_its_latest_records_are_asked_for(
    broker: Broker, base_model: Path, tmp_path: Path
) -> None:
    broker.create_topic("begun-at-its-end")
    log = f"kafka://{broker.bootstrap}/begun-at-its-end"
    watch = cheap_job(base_model, (f"{log}?start=latest",), tmp_path)

    def produce(count: int) -> None:
        with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
            for _ in range(count):
                producer.send("begun-at-its-end", GOOD)

    produce(3)
    state = State(tmp_path / "state")
    assert Slices(watch, state).step() is None
    produce(5)
    commit = Slices(watch, state).step()
    assert commit is not None
    assert commit.total_ledger.seen == 5
    state.close()


def test_the_model_of_a_former_format_is_not_taken_for_one_of_several(
    old: Path, base_model: Path
) -> None:
    before = job(base_model, "out")
    named = replace(before, models=(replace(before.models[0], logged_as=("a-model",)),))
    with pytest.raises(ConfigurationError, match=r"start once without \[\[models\]\]") as caught:
        Slices(named, State(old / "state"))
    assert "\n" not in str(caught.value)


def test_a_model_may_be_called_otherwise_from_now_on(old: Path, base_model: Path) -> None:
    before = job(base_model, "out")
    renamed = replace(before, models=(replace(before.models[0], name="new"),))
    state = State(old / "state")
    slices = Slices(renamed, state)
    held = json.loads((old / "state/commits/00000001.json").read_text())
    assert slices.commit.models["new"].ranges_hash == held["ranges_hash"]
    slices.step()
    state.close()
    assert list(json.loads((old / "state/commits/00000002.json").read_text())["models"]) == ["new"]


def test_status_of_a_state_of_the_former_format(old: Path) -> None:
    lines = list(Status.of(old / "state").lines())
    assert lines[0].startswith("a-model: policy budget")
    closed = ds.dataset(old / "out/archive/conversations").count_rows()
    (line,) = (line for line in lines if line.startswith("user: "))
    # 100 for the bounds, which count segments, and those that a conformal threshold at 5% needs.
    needed = f"NOT calibrated yet, ranges of {closed} conversations; 139 more are needed"
    assert line == f"user: {needed}, there at no known time at the present rate"


def test_a_state_is_held_by_one_process(old: Path) -> None:
    first = State(old / "state")
    with pytest.raises(ConfigurationError, match="in use by another deltawatch"):
        State(old / "state")
    first.close()
    State(old / "state").close()


@pytest.fixture
def begun(old: Path, base_model: Path) -> Iterator[Slices]:
    """Two slices committed, a third begun, the directory still held."""
    state = State(old / "state")
    running = job(base_model, "out")
    state.describe(running.description())
    slices = Slices(running, state)
    slices.step()
    plan = slices._next_plan()
    assert plan is not None
    state.write_plan(plan)
    yield slices
    state.close()


def test_status_of_a_state_that_is_in_use(begun: Slices, old: Path) -> None:
    text = "\n".join(Status.of(old / "state").lines())
    size = (old / "log.jsonl").stat().st_size
    done = begun.commit.progress[0].offset
    for expected in (
        "a-model: policy budget, at most 5.00% of normal traffic",
        "slice 2 committed 20",
        "slice 3 is begun",
        "user: NOT calibrated yet, ranges of ",
        " more are needed, there in about ",
        "records: 20 seen = 20 scored + 0 dead-lettered + 0 skipped; 0 flagged, 0 alerts, 20 not",
        "flagged: 0 of 0 judged (0.00%)",
        f"log.jsonl partition 0: next offset {done}, lag {size - done:,}",
        "archive: out/archive",
    ):
        assert expected in text


def test_status_of_what_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no commit"):
        Status.of(tmp_path)
