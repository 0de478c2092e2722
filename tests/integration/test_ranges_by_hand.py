"""Jobs over several days: what expires, and what people do to ranges by `deltawatch ranges`."""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import traffic
from cheap_job import MODEL, SETTINGS, cheap_job
from outcome import Outcome, Row, run

from pipeline.cli import main
from pipeline.job import Job
from pipeline.learning import frozen
from pipeline.place import Place
from pipeline.slices import Slices
from pipeline.state import State, asked_acts
from schemas.errors import ConfigurationError
from schemas.ids import alert_id
from schemas.records import Position
from transforms.logs.times import EventTime
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.snapshots import load_snapshot, save_snapshot

EPOCH_MS = 4 * 3_600_000
DAY = 6
"""Epochs."""

A_DAY = 60
"""Conversations."""

ENOUGH = 20


@pytest.fixture(scope="module")
def log(conversations: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations of five days; one file."""
    apart = EPOCH_MS * DAY // A_DAY
    timed = [
        {**conversation, "at": traffic.START_MS + apart * number}
        for number, conversation in enumerate(conversations[: 5 * A_DAY])
    ]
    values = [json.dumps(each).encode() for each in timed]
    return traffic.to_files(tmp_path_factory.mktemp("days") / "log", [values])


def job_on(log: str, base: Path, out: Path, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "event_time": EventTime("at"),
        "epoch_ms": EPOCH_MS,
        "keep_days": 1,
        "policy": make_policy("range", PolicySettings(min_calibration=ENOUGH, eps=0.01)),
    }
    return cheap_job(base, (log,), out, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(log: str, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The log read to its end; its state lies in `state` beside its archive."""
    folder = tmp_path_factory.mktemp("whole")
    return run(job_on(log, base_model, folder), folder / "state")


def state_of(found: Outcome) -> Path:
    return found.job.archive.parent / "state"


def steps(slices: Slices, until_epoch: int | None = None) -> None:
    """Run slices to the end, or until an epoch is closed."""
    while until_epoch is None or (slices.commit.closed_epoch or 0) < until_epoch:
        if slices.step() is None:
            return


def test_a_job_judges_by_the_days_that_it_keeps_whatever_its_slices(
    whole: Outcome, log: str, base_model: Path, tmp_path: Path
) -> None:
    small = run(job_on(log, base_model, tmp_path / "s", slice_records=50), tmp_path / "state-s")
    assert small.rows("conversations") == whole.rows("conversations")
    assert small.ranges.hash == whole.ranges.hash
    assert {row["status"] for row in whole.rows("conversations")} == {
        "clean",
        "flagged",
        "uncalibrated",
    }
    check_counts(whole)


def check_counts(found: Outcome) -> None:
    """What each conversation was judged by is recounted from the archive."""
    counted = {
        (row["ranges_hash"], row["role"]): row["n"]
        for row in ranges_rows(found)
        if row["side"] == "high"
    }
    judged = found.rows("conversations")
    compared = 0
    for row in judged[::3]:
        today = row["epoch"] // DAY
        before = [
            other
            for other in judged
            if other["epoch"] < row["epoch"]
            and other["epoch"] // DAY >= today - 1
            and other["status"] != "flagged"
        ]
        having = [sum(place in other["segment_role"] for other in before) for place in (0, 1)]
        if min(having) >= ENOUGH:  # fewer would have let older days stay
            for place, role in enumerate(("user", "assistant")):
                assert counted[row["ranges_hash"], role] == having[place]
            compared += 1
    assert compared > 40


def ranges_rows(found: Outcome) -> list[Row]:
    (model,) = (found.job.archive / "ranges").iterdir()
    return ds.dataset([str(path) for path in model.rglob("*.parquet")]).to_table().to_pylist()


def ranges(*arguments: str | Path) -> int:
    return main(["ranges", *map(str, arguments)])


BY_ANN = ("--who", "ann", "--why", "a new product")


def test_frozen_and_thawed_by_command(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State(tmp_path / "state")
    slices = Slices(job_on(log, base_model, tmp_path, slice_records=20), state)
    first = traffic.START_MS // EPOCH_MS
    steps(slices, first + 8)
    assert ranges("freeze", state.root, *BY_ANN) == 0, "while the job runs"
    assert ranges("freeze", state.root, *BY_ANN) == 2
    assert "is frozen once the open epoch closes (ann asked for freeze: a n" in errors(capsys)
    assert ranges("thaw", state.root, *BY_ANN) == 0, "ends the freeze that waits"
    assert ranges("thaw", state.root, *BY_ANN) == 2
    assert "is not frozen once the open epoch closes (ann asked for thaw" in errors(capsys)
    assert ranges("freeze", state.root, *BY_ANN) == 0
    learned = slices.ranges()[MODEL].hash
    slices.step()
    frozen = slices.ranges()[MODEL].hash
    assert frozen != learned, "what the open epoch counted still counts"
    steps(slices, first + 16)
    assert slices.ranges()[MODEL].hash == frozen
    assert ranges("freeze", state.root, *BY_ANN) == 2
    assert "is frozen; `thaw` ends it" in errors(capsys)
    assert ranges("thaw", state.root, *BY_ANN) == 0
    steps(slices)
    assert slices.ranges()[MODEL].hash != frozen
    acts = slices.commit.models[MODEL].acts
    assert [(act.kind, act.who, act.why) for act in acts] == [
        (kind, "ann", "a new product") for kind in ("freeze", "thaw", "freeze", "thaw")
    ]
    assert all(act.epoch is not None for act in acts)
    state.close()


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_rollback_goes_back_to_the_end_of_a_day(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State(tmp_path / "state")
    job = job_on(log, base_model, tmp_path, slice_records=20, keep_days=30)
    state.describe(job.description())
    slices = Slices(job, state)
    day = traffic.START_MS // EPOCH_MS // DAY
    steps(slices, (day + 1) * DAY - 1)
    assert slices.commit.closed_epoch == (day + 1) * DAY - 1, "no slice goes beyond a day"
    then = slices.ranges()[MODEL].hash
    steps(slices, (day + 3) * DAY + 2)
    assert slices.ranges()[MODEL].hash != then
    assert ranges("rollback", state.root, "--to", "2001-01-01", *BY_ANN) == 2
    assert "holds nothing of days up to 2001-01-01" in capsys.readouterr().err
    assert not any(slices.missing()[MODEL])
    assert ranges("rollback", state.root, "--to", "2023-11-14", *BY_ANN) == 0
    said = errors(capsys)
    for role in ("user", "assistant"):
        assert f"role {role} will not be judged until there are enough again" in said
    slices.step()
    assert slices.ranges()[MODEL].hash == then
    assert all(slices.missing()[MODEL])
    slices.step()
    assert not asked_acts(state.root), "done, and forgotten"
    assert ranges("show", state.root) == 0
    said = capsys.readouterr().out
    assert "rollback to 2023-11-14 by ann" in said
    assert "2023-11-14: " in said
    state.close()


def test_what_was_accepted_is_not_flagged_again(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same log once more: all that was flagged and is accepted passes."""
    policy = make_policy("budget", SETTINGS)
    begun = run(job_on(log, base_model, tmp_path / "1", policy=policy), tmp_path / "state-1")
    flagged = [row for row in begun.rows("conversations") if row["status"] == "flagged"]
    assert len(flagged) >= 4
    snapshot, ids = tmp_path / "snapshot", tmp_path / "ids.txt"
    save_snapshot(begun.ranges, snapshot, {"max_tokens": 160})
    alerts = begun.alerts()
    ids.write_text("\n".join(alert["finding_info"]["uid"] for alert in alerts[1:]))
    first = alerts[0]["finding_info"]["uid"][:12]
    archive = ("--archive", begun.job.archive)
    new = ("--out", tmp_path / "new")
    assert ranges("accept", snapshot, *archive, *new, *BY_ANN) == 2, "everything? say so"
    assert ranges("accept", snapshot, *archive, "--alert", "0" * 64, *new, *BY_ANN) == 2
    chosen = ("--alert", first, "--ids", ids)
    assert ranges("accept", snapshot, *archive, *chosen, *BY_ANN) == 2, "where to?"
    wrong = ("--alert", first, "0" * 64)
    assert ranges("accept", snapshot, *archive, *wrong, *new, *BY_ANN) == 2, "one is not there"
    other = ("--model", "another")
    assert ranges("accept", snapshot, *archive, *chosen, *other, *new, *BY_ANN) == 2
    assert "no alert or conversation" in capsys.readouterr().err
    assert ranges("accept", snapshot, *archive, *chosen, *new, *BY_ANN) == 0
    assert (
        f"{len(alerts)} conversations of {MODEL} are to count as normal" in capsys.readouterr().err
    )
    widened = load_snapshot(tmp_path / "new", begun.ranges.directions_hash)
    assert widened.accepted is not None
    assert widened.accepted.conversations.total == len(alerts)
    assert replace(widened, accepted=None).hash == begun.ranges.hash
    found = again(begun, tmp_path / "2", replace_base(begun, widened))
    before = again(begun, tmp_path / "3", replace_base(begun, begun.ranges))
    were = {alert["finding_info"]["uid"] for alert in alerts}
    assert were & before, "without, some are flagged again"
    assert not were & found
    made = json.loads((tmp_path / "new/ranges.json").read_text())["made"]
    assert (made["who"], made["why"]) == ("ann", "a new product")
    assert made["accepted_into"] == begun.ranges.hash


def replace_base(begun: Outcome, base: Any) -> Job:
    (model,) = begun.job.models
    return replace(begun.job, models=(replace(model, base_ranges=base),), epoch_ms=10**14)


def again(begun: Outcome, out: Path, job: Job) -> set[str]:
    """Ids of the alerts when the log is judged once more, by ranges that are given."""
    job = replace(job, archive=out / "archive", alerts=str(out / "alerts.jsonl"))
    return {alert["finding_info"]["uid"] for alert in run(job, out / "state").alerts()}


def test_named_by_its_own_id_a_clean_conversation_is_accepted_too(
    whole: Outcome, tmp_path: Path
) -> None:
    snapshot, out = tmp_path / "snapshot", tmp_path / "new"
    save_snapshot(whole.ranges, snapshot, {"max_tokens": 160})
    clean = [row["conversation_id"] for row in whole.rows("conversations") if is_clean(row)][:3]
    chosen = ("--archive", whole.job.archive, "--alert", *clean, "--out", out)
    assert ranges("accept", snapshot, *chosen, *BY_ANN) == 0
    group = load_snapshot(out, whole.ranges.directions_hash).accepted
    assert group is not None
    assert group.conversations.total == 3


def is_clean(row: Row) -> bool:
    return bool(row["status"] == "clean")


def test_it_is_said_which_alerts_would_not_come_again(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every conversation of the log is there twice, so the accepted one has a double."""
    lines = (Path(log).parent / "0.jsonl").read_bytes().splitlines()
    doubled = traffic.to_files(tmp_path / "doubled", [lines, lines])
    policy = make_policy("budget", SETTINGS)
    job, state = job_on(doubled, base_model, tmp_path, policy=policy), State(tmp_path / "state")
    state.describe(job.description())
    slices = Slices(job, state)
    steps(slices)
    begun = Outcome(job, slices.commit, {})
    flagged = [row for row in begun.rows("conversations") if row["status"] == "flagged"]
    highest = max(flagged, key=lambda row: row["score"])
    position = Position(*(highest[name] for name in ("source", "partition", "offset")))
    alert = alert_id(position, highest["directions_hash"], highest["policy"])
    chosen = ("--archive", job.archive, "--alert", alert)
    assert ranges("accept", state.root, *chosen, *BY_ANN) == 0
    found = re.search(r"WARNING: of (\d+) others that are .* (\d+) would pass", errors(capsys))
    assert found, "its double would"
    assert 1 <= int(found[2]) <= int(found[1]) < len(flagged)
    state.close()


def test_accepted_in_a_state_takes_effect_when_an_epoch_closes(
    log: str, base_model: Path, tmp_path: Path
) -> None:
    state = State(tmp_path / "state")
    policy = make_policy("budget", SETTINGS)
    slices = Slices(job_on(log, base_model, tmp_path, slice_records=20, policy=policy), state)
    steps(slices, traffic.START_MS // EPOCH_MS + 25)
    assert slices.commit.total_ledger.flagged
    span = ("--since", "2023-11-14", "--until", "2023-11-20T00:00:00+00:00")
    archive = ("--archive", tmp_path / "archive")
    assert ranges("accept", state.root, *archive, *span, *BY_ANN) == 0
    assert slices.ranges()[MODEL].accepted is None
    slices.step()
    group = slices.ranges()[MODEL].accepted
    assert group is not None
    steps(slices)
    rows = Outcome(slices._job, slices.commit, {}).rows("conversations")
    assert 0 < group.conversations.total <= Counter(row["status"] for row in rows)["flagged"]
    by_epoch = {(row["epoch"], row["ranges_hash"]) for row in rows}
    assert len(by_epoch) == len({epoch for epoch, _ in by_epoch}), "an epoch is judged by one"
    kept = slices.ranges()[MODEL].accepted
    assert kept is not None
    assert kept.hash == group.hash
    assert Place.of(state.root, None).held.acts[0].ranges_hash == group.hash
    state.close()


def test_a_rollback_to_a_day_that_expires_meanwhile_is_not_done(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State(tmp_path / "state")
    slices = Slices(job_on(log, base_model, tmp_path, slice_records=20), state)
    day = traffic.START_MS // EPOCH_MS // DAY
    steps(slices, (day + 3) * DAY - 2)
    assert min(slices.commit.models[MODEL].generations) == day + 1
    assert ranges("rollback", state.root, "--to", "2023-11-15", *BY_ANN) == 0
    assert "WARNING" not in errors(capsys), "no job has said by which policy it judges"
    steps(slices, (day + 3) * DAY - 1)
    assert "rollback of a-model, asked for by ann, was not done" in errors(capsys)
    assert set(slices.commit.models[MODEL].generations) == {day + 2}
    assert not any(slices.missing()[MODEL])
    assert ranges("show", state.root) == 0
    assert "rollback to 2023-11-15 by ann at" in (said := capsys.readouterr().out)
    assert ", NOT DONE: a new product" in said
    state.close()


def test_an_accept_is_revoked_by_the_id_that_is_shown(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State(tmp_path / "state")
    policy = make_policy("budget", SETTINGS)
    slices = Slices(job_on(log, base_model, tmp_path, slice_records=20, policy=policy), state)
    steps(slices, traffic.START_MS // EPOCH_MS + 25)
    archive = ("--archive", tmp_path / "archive")
    for since in ("2023-11-14", "2023-11-15"):
        assert ranges("accept", state.root, *archive, "--since", since, *BY_ANN) == 0
    first, second = (act.id for act in asked_acts(state.root))
    assert ranges("show", state.root) == 0
    shown = capsys.readouterr().out
    assert all(f"accept {name} by ann at" in shown for name in (first, second))
    assert ranges("revoke", state.root, "accept", *BY_ANN) == 2
    assert "has no accept 'accept' in force; `ranges show` lists their ids" in errors(capsys)
    assert ranges("revoke", state.root, first, *BY_ANN) == 0, "while it waits, too"
    assert ranges("revoke", state.root, first, *BY_ANN) == 2, "once"
    slices.step()
    group = slices.ranges()[MODEL].accepted
    assert group is not None
    assert group.hash == slices.commit.models[MODEL].acts[1].ranges_hash
    assert ranges("revoke", state.root, second, *BY_ANN) == 0
    counted = replace(slices.ranges()[MODEL], accepted=None)
    with_open = counted.merged(state.read_ranges(slices.commit.models[MODEL].open_hash))
    steps(slices, (slices.commit.closed_epoch or 0) + 1)
    left = slices.ranges()[MODEL]
    assert left.accepted is None
    assert left.conversations.total >= with_open.conversations.total, "what was learnt is kept"
    assert ranges("show", state.root) == 0
    assert f"revoke {second} by ann at" in capsys.readouterr().out
    assert ranges("revoke", state.root, second, *BY_ANN) == 2
    state.close()


def test_what_was_archived_under_a_former_name_can_be_accepted(
    log: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = State(tmp_path / "state")
    job = job_on(
        log, base_model, tmp_path, slice_records=20, policy=make_policy("budget", SETTINGS)
    )
    slices = Slices(job, state)
    steps(slices, traffic.START_MS // EPOCH_MS + 25)
    assert ranges("freeze", state.root, *BY_ANN) == 0
    renamed = Slices(replace(job, models=(replace(job.models[0], name="new"),)), state)
    renamed.step()
    assert frozen(renamed.commit.models["new"].acts), "an act by the former name is done"
    assert ranges("thaw", state.root, *BY_ANN) == 0
    chosen = ("--archive", tmp_path / "archive", "--until", "2023-11-18T12:00")
    assert ranges("accept", state.root, *chosen, *BY_ANN) == 2
    assert "--model says under which name" in errors(capsys)
    assert ranges("accept", state.root, *chosen, "--model", MODEL, *BY_ANN) == 0
    assert asked_acts(state.root)[-1].model == "new"
    steps(renamed, (renamed.commit.closed_epoch or 0) + 1)
    assert renamed.ranges()["new"].accepted is not None
    state.close()


def test_what_the_system_refuses_is_said_in_one_line(
    whole: Outcome,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    state = shutil.copytree(state_of(whole), tmp_path / "state")
    snapshot, file = tmp_path / "snapshot", tmp_path / "file"
    save_snapshot(whole.ranges, snapshot, {"max_tokens": 160})
    file.touch()
    monkeypatch.setattr("getpass.getuser", nobody)
    assert ranges("freeze", state, "--why", "x") == 0
    assert [act.who for act in asked_acts(state)] == [str(os.getuid())]
    shutil.rmtree(state / "acts")
    (state / "acts").touch()
    (damaged,) = state.glob(f"ranges/{whole.ranges.hash}*")
    refused = [
        (("freeze", state), "; do it as the user that the job runs as"),
        (("merge", snapshot, "--out", file / "x"), "(Not a directory); give --out a writable"),
        (("show", snapshot, "--plot", tmp_path / "no/x.svg"), "(No such file or directory); give"),
        (("show", state), f"{damaged} cannot be read (not a safetensors file"),
    ]
    capsys.readouterr()
    damaged.write_bytes(damaged.read_bytes()[:-9])
    for arguments, words in refused:
        by = () if arguments[0] == "show" else BY_ANN
        assert ranges(*arguments, *by) == 2
        said = errors(capsys)
        assert words in said
        assert said.count("\n") == 1
    (state / "acts").unlink()
    held = State(state)
    held.describe(whole.job.description())
    assert main(["status", f"--state={state}"]) == 2
    assert f"{damaged} cannot be read (not a safetensors file" in errors(capsys)
    with pytest.raises(ConfigurationError, match="restore the state from a backup"):
        Slices(whole.job, held)
    held.close()


def test_snapshots_are_merged_exactly(whole: Outcome, tmp_path: Path) -> None:
    one, out = tmp_path / "one", ("--out", tmp_path / "merged")
    save_snapshot(whole.ranges, one, {"max_tokens": 160})
    assert ranges("merge", one, state_of(whole), *out, *BY_ANN) == 0
    merged = load_snapshot(tmp_path / "merged", whole.ranges.directions_hash)
    assert merged.hash == whole.ranges.merged(whole.ranges).hash
    assert ranges("merge", one, *out, *BY_ANN) == 2, "is there"
    save_snapshot(whole.ranges, tmp_path / "long", {"max_tokens": 2048})
    assert ranges("merge", one, tmp_path / "long", "--out", tmp_path / "n", *BY_ANN) == 2
    assert ranges("show", tmp_path / "nothing") == 2


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_ranges_are_shown_as_a_table_and_a_picture(
    whole: Outcome,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    begins: bytes,
) -> None:
    picture = tmp_path / f"ranges{suffix}"
    assert ranges("show", state_of(whole), "--plot", picture, "--top", "3") == 0
    assert picture.read_bytes().startswith(begins)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ranges {whole.ranges.hash} of {MODEL}"
    table = lines[lines.index("") + 2 :]
    assert len(table) == 3
    extremes = {
        (f"#{int(row['direction'][1:].split('_')[0])}", row["role"], row["side"]): row["extreme"]
        for row in ranges_rows(whole)
        if row["ranges_hash"] == whole.ranges.hash
    }
    for line in table:
        *series, _, _, _, farthest = line.split()
        assert float(farthest) == pytest.approx(extremes[tuple(series)], abs=5e-5)
    assert ranges("show", state_of(whole), "--plot", tmp_path / "ranges.gif") == 2
