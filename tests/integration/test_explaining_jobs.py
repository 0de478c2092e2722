"""What whole jobs judged is recomputed from their archives alone, bit for bit.

Every conversation, clean ones too, is judged anew in another order than the job's, by rows that the
test finds in its own way; every alert by the command that people use.
"""

import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import traffic
from cheap_job import DIRECTIONS, SETTINGS, CheapEngine, cheap_directions, cheap_job
from outcome import Outcome, run

from pipeline.cli import main
from pipeline.job import Job, Model
from pipeline.slices import Slices
from pipeline.state import State, ask
from schemas.acts import Act, ActKind
from transforms.archive.fitted import basis
from transforms.archive.segments import segments_of
from transforms.logs.times import EventTime
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges

EPOCH_MS = 60_000
CALIBRATION = 200
FEW = replace(SETTINGS, percentile=99.5)
"""Of the alerts `percentile` would send by the other settings, which are hundreds."""


@pytest.fixture(scope="module")
def records(conversations: list[dict[str, Any]]) -> traffic.Records:
    return traffic.records(conversations)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, records: traffic.Records) -> str:
    return traffic.to_files(tmp_path_factory.mktemp("logs") / "parts", records)


@pytest.fixture(scope="module")
def snapshot(records: traffic.Records, base_model: Path) -> Ranges:
    """Of the log's first conversations."""
    entries = traffic.entries(records, CheapEngine(base_model))
    return traffic.snapshot([each for each in entries if each.segments is not None][:CALIBRATION])


def job_of(base: Path, log: str, out: Path, **changes: Any) -> Job:
    settings = {"event_time": EventTime(traffic.TIME_FIELD), "epoch_ms": EPOCH_MS, **changes}
    return cheap_job(base, (log,), out, **settings)


def read(archive: Path, table: str, model: str) -> pa.Table:
    files = sorted((archive / table / f"model={model}").rglob("*.parquet"))
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


def assert_alerts_are_reproduced(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> int:
    """By the command; returns how many there are."""
    capsys.readouterr()
    alerts = outcome.alerts()
    for alert in alerts:
        uid, own = alert["finding_info"]["uid"], alert["unmapped"]
        assert main(["explain", uid, f"--archive={outcome.job.archive}"]) == 0, uid
        text = capsys.readouterr().out
        assert text.endswith("\nreproduced\n")
        assert text.startswith(f"alert {uid}\n")
        user, assistant = own["calibrated_on"]["user"], own["calibrated_on"]["assistant"]
        assert f"{user:,} conversations with a user, {assistant:,} with an assistant" in text
        assert own["ranges_hash"] in text
    return len(alerts)


def assert_judged_again(archive: Path, model: str, directions: int = DIRECTIONS) -> set[str]:
    """All conversations get their status and score again; returns the statuses."""
    conversations, ranges = read(archive, "conversations", model), read(archive, "ranges", model)
    together = defaultdict(list)
    keys = conversations.select(["ranges_hash", "epoch"]).to_pylist()
    for row, key in enumerate(keys):
        together[key["ranges_hash"], key["epoch"]].append(row)
    for (digest, epoch), rows in together.items():
        chosen = ranges.filter(pc.equal(ranges["ranges_hash"], digest))
        before = chosen.filter(pc.less(chosen["epoch"], epoch))
        newest = before.filter(pc.equal(before["epoch"], pc.max(before["epoch"])))
        assert len(newest) == 4 * directions
        random.Random(len(rows)).shuffle(rows)
        mine = conversations.take(rows)
        found = basis(newest).fitted.judge(segments_of(mine, directions)).records()
        archived = mine.select(["status", "role", "score", "threshold"]).to_pylist()
        for row, judgement in zip(archived, found, strict=True):
            role = None if judgement.role is None else judgement.role.name.lower()
            numbers = (_float32(judgement.score), _float32(judgement.threshold))
            assert (judgement.status, role, *numbers) == tuple(row.values())
    return set(conversations["status"].to_pylist())


def _float32(steps: int | None) -> float | None:
    return None if steps is None else float(np.float32(steps / 32767))


@pytest.mark.parametrize(
    ("name", "begun"),
    [
        ("budget", "from nothing"),
        ("budget", "from a snapshot"),
        ("percentile", "from a snapshot"),
        ("range", "from nothing"),
    ],
)
def test_what_a_job_judged_is_recomputed(
    name: str,
    begun: str,
    base_model: Path,
    log: str,
    snapshot: Ranges,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = {"base_ranges": snapshot} if begun == "from a snapshot" else {}
    job = job_of(base_model, log, tmp_path, policy=make_policy(name, FEW), **base)
    outcome = run(replace(job, slice_records=170), tmp_path / "state")
    statuses = assert_judged_again(job.archive, "a-model")
    assert {"clean", "flagged"} <= statuses
    assert ("uncalibrated" in statuses) == (begun == "from nothing")
    assert assert_alerts_are_reproduced(outcome, capsys) > 5
    epochs = read(job.archive, "ranges", "a-model")["epoch"].to_pylist()
    closed = set(read(job.archive, "conversations", "a-model")["epoch"].to_pylist())
    # One for every epoch closed, and one for what the first of them was judged by.
    assert sorted(epochs) == sorted(4 * DIRECTIONS * [*closed, min(closed) - 1])


def test_a_log_without_times_is_recomputed(
    base_model: Path, log: str, snapshot: Ranges, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it is one epoch, judged by what it began with."""
    job = job_of(base_model, log, tmp_path, event_time=EventTime(None), base_ranges=snapshot)
    outcome = run(replace(job, slice_records=170), tmp_path / "state")
    assert_judged_again(job.archive, "a-model")
    assert assert_alerts_are_reproduced(outcome, capsys) > 5


def test_another_rate_in_the_middle_of_an_epoch_is_recomputed(
    base_model: Path, log: str, snapshot: Ranges, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = job_of(base_model, log, tmp_path, base_ranges=snapshot, slice_records=60)
    state = State(tmp_path / "state")
    slices = Slices(first, state)
    while slices.step() and not slices.commit.pending:
        pass
    assert slices.commit.pending
    state.close()
    other = replace(first, policy=make_policy("budget", PolicySettings(rate=0.2)))
    outcome = run(other, tmp_path / "state")
    assert assert_alerts_are_reproduced(outcome, capsys) > 5
    settings = read(first.archive, "ranges", "a-model").group_by(["epoch", "settings"])
    counts = settings.aggregate([("n", "count")])["n_count"].to_pylist()
    assert set(counts) == {4 * DIRECTIONS}, "each once"
    epochs = settings.aggregate([])["epoch"].to_pylist()
    assert len(epochs) == len(set(epochs)) + 1, "one epoch was judged by two rates"


def test_a_model_that_was_added_later_is_recomputed(
    conversations: list[dict[str, Any]],
    base_model: Path,
    snapshot: Ranges,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And no restart, here after every slice, writes rows again that stand there."""
    chance = random.Random(5)
    said = [{**each, "model": chance.choice(["one", "two"])} for each in conversations]
    log = traffic.to_files(tmp_path / "parts", traffic.records(said))
    one, two = (
        Model(name, CheapEngine(base_model), cheap_directions(), of_model, (name,))
        for name in ("one", "two")
        for of_model in [replace(snapshot, model=name)]
    )
    job = job_of(base_model, log, tmp_path, models=(one,), slice_records=70)
    slices = after_each_slice_anew(job, tmp_path / "state", 4)
    met = slices.commit.closed_epoch
    both = replace(job, models=(one, two))
    slices = after_each_slice_anew(both, tmp_path / "state")
    assert_alerts_are_reproduced(Outcome(both, slices.commit, slices.ranges()), capsys)
    for name in ("one", "two"):
        assert "flagged" in assert_judged_again(job.archive, name)
        epochs = Counter(read(job.archive, "ranges", name)["epoch"].to_pylist())
        assert set(epochs.values()) == {4 * DIRECTIONS}
        assert (min(epochs) == met) == (name == "two")


def test_what_people_did_to_ranges_and_what_expired_is_recomputed(
    conversations: list[dict[str, Any]],
    base_model: Path,
    snapshot: Ranges,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twenty days, of which three are kept; accepted, frozen, thawed and rolled back meanwhile."""
    start, hour = 1_700_006_400_000, 3_600_000
    log = tmp_path / "log.jsonl"
    with log.open("w") as file:
        for number, each in enumerate(conversations[:300]):
            file.write(
                json.dumps({**each, "logged": {"at": start + number * hour * 8 // 5}}) + "\n"
            )
    job = job_of(
        base_model,
        str(log),
        tmp_path,
        epoch_ms=6 * hour,
        keep_days=3,
        policy=make_policy("percentile", FEW),
        slice_records=60,
    )
    day = start // (24 * hour)
    acts = {
        1: Act("a", ActKind.ACCEPT, "a-model", "me", 1, "new", snapshot.hash),
        4: Act("b", ActKind.FREEZE, "a-model", "me", 2, "an attack"),
        6: Act("c", ActKind.THAW, "a-model", "me", 3, "over"),
        8: Act("d", ActKind.ROLLBACK, "a-model", "me", 4, "that was it", generation=day + 6),
    }
    state = State(tmp_path / "state")
    slices = Slices(job, state)
    while slices.step():
        if act := acts.get(slices.commit.number):
            ask(state.root, act, snapshot if act.kind is ActKind.ACCEPT else None)
    state.close()
    (held,) = slices.commit.models.values()
    assert [act.kind for act in held.acts] == [act.kind for act in acts.values()]
    assert min(held.generations) > day, "some have expired"
    outcome = Outcome(job, slices.commit, slices.ranges())
    assert assert_alerts_are_reproduced(outcome, capsys) > 5
    assert "flagged" in assert_judged_again(job.archive, "a-model")
    told = read(job.archive, "ranges", "a-model").group_by(["epoch", "ranges_hash"])
    hashes = Counter(told.aggregate([("n", "count")])["ranges_hash"].to_pylist())
    assert max(hashes.values()) > 3, "while they were frozen"


def after_each_slice_anew(job: Job, root: Path, most: int = 1000) -> Slices:
    for _ in range(most):
        state = State(root)
        slices = Slices(job, state)
        went_on = slices.step()
        state.close()
        if went_on is None:
            break
    return slices
