"""Verdicts recomputed from archives: as judged, tampered with, and of versions before and after."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from normal_traffic import DIRECTIONS, moved, traffic
from sample_verdicts import DIRECTIONS_HASH, EPOCH_MS, sample_directions

from pipeline.cli import main
from pipeline.explaining import Explanation, explain
from schemas.arrow import CONVERSATIONS, EXCEEDANCES, RANGES
from schemas.errors import ConfigurationError
from schemas.ocsf import alerts, to_ocsf
from schemas.records import Header, Position, Role, ScoredPack, ScoredRow, Status, VerdictPack
from transforms.archive import files, fitted, rows
from transforms.archive.chosen import Choice, read_chosen
from transforms.ranges.calibration import calibrate
from transforms.ranges.judging import Judge
from transforms.ranges.policies import POLICY_NAMES, Policy, PolicySettings, make_policy
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import Stretches, per_series

MODEL = "org/a model"
SETTINGS = PolicySettings(rate=0.05, percentile=95, min_calibration=30, eps=0.01)
EMPTY = Ranges.empty(DIRECTIONS, DIRECTIONS_HASH, MODEL)
NAMED = sample_directions(DIRECTIONS)
EPOCH = 2_833_340
N = 120

Change = Callable[[pa.Table], pa.Table]


def calibrated(n: int = 400, seed: int = 1) -> Ranges:
    return calibrate(lambda: [(np.arange(n), traffic(n, seed))], EMPTY)


def with_accepted(n: int = 400) -> Ranges:
    """Ranges into which 40 conversations were admitted that are high in one direction."""
    ranges, other = calibrated(n), traffic(40, seed=8)
    odd = moved(other, other.role == Role.USER, 2, 9000)
    return ranges.accepting(EMPTY.plus(Stretches.of(odd)))


def ranges_rows(policy: Policy, ranges: Ranges, epoch: int) -> pa.Table:
    """What the job writes of ranges."""
    counts = ranges.conversations
    return rows.ranges_table(
        epoch,
        epoch * EPOCH_MS,
        ranges.hash,
        per_series(counts.stretches, DIRECTIONS),
        counts.maximum,
        {name: counts.quantile_of_all(0.5) for name in ("p50", "p90", "p99", "p999")},
        fitted.columns(policy, ranges),
        NAMED,
        DIRECTIONS_HASH,
    )


def judged(policy: Policy, ranges: Ranges, seed: int = 2, n: int = N) -> VerdictPack:
    """Conversations of one epoch, five of them far from normal, as the job judges them."""
    segments = traffic(n, seed)
    segments = moved(segments, (segments.row < 5) & (segments.role == Role.USER), 3, 20_000)
    times = [EPOCH * EPOCH_MS + 1000 * row for row in range(n)]
    scored = tuple(
        ScoredRow(
            Header(Position("kafka://c/t", row % 3, seed * 1000 + row), time, time, EPOCH, False),
            f"conversation {seed}-{row}",
            int(segments.tokens[segments.row == row].sum()),
            False,
        )
        for row, time in enumerate(times)
    )
    pack = ScoredPack(MODEL, EPOCH, scored, segments)
    verdicts, _ = Judge(policy).judge(pack, ranges, EMPTY)
    return verdicts


def as_it_is(table: pa.Table) -> pa.Table:
    return table


def archive_of(
    folder: Path, policy: Policy, ranges: Ranges, changes: dict[str, Change] | None = None
) -> VerdictPack:
    """Leave an archive, its tables changed; returns what was judged."""
    pack = judged(policy, ranges)
    tables = {
        CONVERSATIONS: rows.conversations_table([pack], NAMED, DIRECTIONS_HASH),
        EXCEEDANCES: rows.exceedances_table([pack], NAMED, DIRECTIONS_HASH),
        RANGES: ranges_rows(policy, ranges, EPOCH - 1),
    }
    for name, table in tables.items():
        change = (changes or {}).get(name, as_it_is)
        write(folder, name, change(table))
    return pack


def write(folder: Path, table: str, content: pa.Table, name: str = "e") -> None:
    path = folder / "pending.parquet"
    files.write_table(content, path)
    files.merge([path], folder, table, MODEL, name)
    path.unlink()


def ids(pack: VerdictPack) -> list[str]:
    """Of the alerts that the job sends."""
    sent = [to_ocsf(alert) for alert in alerts(pack, NAMED, DIRECTIONS_HASH)]
    return [event["metadata"]["uid"] for event in sent]


def explained(folder: Path, named: str) -> Explanation:
    (explanation,) = explain(folder, named)
    return explanation


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize(
    "ranges", [EMPTY, calibrated(1), calibrated(25), calibrated(150), with_accepted()],
    ids=["empty", "1", "25", "150", "accepted"],
)  # fmt: skip
def test_a_policy_read_back_is_the_one_that_was_fitted(
    name: str, ranges: Ranges, tmp_path: Path
) -> None:
    policy = make_policy(name, SETTINGS)
    write(tmp_path, RANGES, ranges_rows(policy, ranges, 7))
    (path,) = tmp_path.rglob("*.parquet")
    found = fitted.basis(pq.ParquetFile(path).read())
    expected = policy.fit(ranges)
    for each in fields(expected):
        if each.name != "bounds":
            assert getattr(found.fitted, each.name) == getattr(expected, each.name), each.name
    assert found.fitted.bounds.dtype == expected.bounds.dtype
    counted = per_series(ranges.conversations.stretches, DIRECTIONS) > 0
    assert found.fitted.bounds[counted].tolist() == expected.bounds[counted].tolist()
    assert found.policy == policy
    assert found.conversations == tuple(ranges.conversations.stretches)
    assert [entry.name for entry in found.directions] == [each.name for each in NAMED]
    probe = traffic(100, seed=3)
    assert found.fitted.judge(probe).records() == expected.judge(probe).records()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_alert_is_reproduced(name: str, tmp_path: Path) -> None:
    policy, ranges = make_policy(name, SETTINGS), with_accepted()
    sent = ids(archive_of(tmp_path, policy, ranges))
    assert len(sent) >= 5
    for uid in sent:
        for named in (uid, uid[:8]):
            assert list(explained(tmp_path, named).lines())[-1] == "reproduced"


@pytest.mark.parametrize(("n", "status"), [(400, Status.CLEAN), (25, Status.UNCALIBRATED)])
def test_conversations_without_alert_are_found_by_their_own_id(
    n: int, status: Status, tmp_path: Path
) -> None:
    pack = archive_of(tmp_path, make_policy("budget", SETTINGS), calibrated(n))
    row = [judgement.status for judgement in pack.judgements].index(status)
    explanation = explained(tmp_path, f"conversation 2-{row}")
    assert explanation.reproduced
    lines = list(explanation.lines())
    assert lines[0] == "no alert"
    assert f"conversation 2-{row} of model {MODEL}: {status}" in lines[1]


def test_a_person_reads_what_the_verdict_rests_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranges = calibrated()
    pack = archive_of(tmp_path, make_policy("budget", SETTINGS), ranges)
    uid, judgement = ids(pack)[0], pack.judgements[0]
    assert main(["explain", uid[:12], f"--archive={tmp_path}"]) == 0
    text = capsys.readouterr().out
    user, assistant = ranges.conversations.stretches
    first = judgement.exceedances[0]
    assert judgement.score is not None and judgement.threshold is not None
    for part in (
        f"alert {uid}\n",
        "conversation 2-0 of model org/a model: flagged",
        "log kafka://c/t partition 0 offset 2000; 2023-11-14T23:20:00+00:00",
        "policy budget/3, at most 5.00% of normal traffic",
        f"calibrated on {user} conversations with a user, {assistant} with an assistant",
        f"ranges {ranges.hash}",
        f"user: score {judgement.score / 32767:.4f}",
        f"threshold {judgement.threshold / 32767:.4f}, above it",
        f"{first.value / 32767:+.4f}  {first.bound / 32767:+.4f}  {first.margin / 32767:+.4f}",
        f"  [{first.token}, {first.token + 1})\n",
    ):
        assert part in text
    assert NAMED[3].name in text
    assert text.endswith("\nreproduced\n")


def altered(column: str, place: int, value: Any) -> Change:
    """One value of a column is another; of a list, with a step more in its first place."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[place] = value(values[place])
        number = table.schema.get_field_index(column)
        field = table.schema.field(column)
        return table.set_column(number, field, pa.array(values, field.type))

    return change


def step_more(cosine: float) -> float:
    return (round(cosine * 32767) + 1) / 32767


def ulp_more(cosine: float) -> float:
    return float(np.nextafter(np.float32(cosine), np.float32(2)))


def first_more(steps: list[int]) -> list[int]:
    return [steps[0] + 1, *steps[1:]]


def peak_more(steps: list[int]) -> list[int]:
    place = steps.index(20_000)
    return [*steps[:place], 20_001, *steps[place + 1 :]]


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def without_first(table: pa.Table) -> pa.Table:
    return table.slice(1)


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        (CONVERSATIONS, altered("score", 0, ulp_more), r"score differs \(archive 0\.\d+, recomp"),
        (CONVERSATIONS, altered("threshold", 0, ulp_more), "threshold differs"),
        (CONVERSATIONS, altered("status", 0, to("clean")), "status differs .archive clean, recomp"),
        (CONVERSATIONS, altered("role", 0, to("assistant")), "role differs .archive assistant, r"),
        (
            CONVERSATIONS,
            altered("role", 0, to(None)),
            "role differs .archive none, recomputed user",
        ),
        (CONVERSATIONS, altered("segment_high", 0, peak_more), r"score differs.*high\[3\] differs"),
        (CONVERSATIONS, altered("low", 0, first_more), r"low\[0\] differs"),
        (EXCEEDANCES, altered("value", 0, ulp_more), "value of exceedance 1 differs"),
        (EXCEEDANCES, altered("margin", 0, ulp_more), "margin of exceedance 1 differs"),
        (EXCEEDANCES, altered("token_start", 0, to(77)), "token_start of exceedance 1 differs"),
        (EXCEEDANCES, altered("direction", 0, to("O9_u9")), "direction of exceedance 1 differs"),
        (EXCEEDANCES, altered("epoch", 0, to(EPOCH - 1)), "epoch of exceedance 1 differs"),
        (
            EXCEEDANCES,
            altered("effective_time", 0, lambda time: time + timedelta(milliseconds=1)),
            r"effective_time of exceedance 1 differs .archive 2023-11-14 23:20:00\.001",
        ),
        (
            EXCEEDANCES,
            altered("conversation_id", 0, to("x")),
            "conversation_id of exceedance 1 dif",
        ),
        (EXCEEDANCES, without_first, r"number of exceedances differs \(archive 0, recomputed 1\)"),
        (RANGES, altered("bound", 3, step_more), "score differs.*bound of exceedance 1 differs"),
        (RANGES, altered("threshold", 0, step_more), "threshold differs"),
        (RANGES, altered("handicap", 0, lambda cosine: cosine + 8 / 32767), "score differs"),
        (RANGES, altered("known", 0, to(False)), "status differs .archive flagged, recomputed"),
    ],
)
def test_what_was_tampered_with_is_found(
    table: str, change: Change, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive_of(tmp_path, make_policy("budget", SETTINGS), calibrated(), {table: change})
    assert main(["explain", "conversation 2-0", f"--archive={tmp_path}"]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert re.match(f"NOT reproduced: .*{words}", last), last
    assert main(["explain", "conversation 2-3", f"--archive={tmp_path}"]) == (table == RANGES)


def test_a_verdict_by_other_settings_in_the_same_epoch_is_reproduced(tmp_path: Path) -> None:
    """After the rate was changed, rows of the same ranges stand there by either."""
    ranges, other = calibrated(), make_policy("budget", replace(SETTINGS, rate=0.2))
    pack = archive_of(tmp_path, make_policy("budget", SETTINGS), ranges)
    write(tmp_path, RANGES, ranges_rows(other, ranges, EPOCH - 1), "f")
    write(tmp_path, RANGES, ranges_rows(other, ranges, EPOCH), "g")
    later = judged(other, ranges, seed=5)
    write(tmp_path, CONVERSATIONS, rows.conversations_table([later], NAMED, DIRECTIONS_HASH), "f")
    write(tmp_path, EXCEEDANCES, rows.exceedances_table([later], NAMED, DIRECTIONS_HASH), "f")
    assert len(ids(later)) > len(ids(pack))
    for found, asked in ((pack, "5.00%"), (later, "20.00%")):
        for uid in ids(found):
            explanation = explained(tmp_path, uid)
            assert explanation.reproduced
            assert f"at most {asked}" in "\n".join(explanation.lines())


def test_a_record_judged_twice_is_explained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two audits of a log, under other ranges, into one archive."""
    policy = make_policy("budget", SETTINGS)
    archive_of(tmp_path, policy, calibrated())
    again, ranges = judged(policy, calibrated(seed=6)), calibrated(seed=6)
    write(tmp_path, CONVERSATIONS, rows.conversations_table([again], NAMED, DIRECTIONS_HASH), "f")
    write(tmp_path, EXCEEDANCES, rows.exceedances_table([again], NAMED, DIRECTIONS_HASH), "f")
    write(tmp_path, RANGES, ranges_rows(policy, ranges, EPOCH - 1), "f")
    assert main(["explain", ids(again)[0], f"--archive={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("reproduced") == 2
    assert len({line for line in lines if "; ranges " in line}) == 2


def test_one_judged_by_two_policies_is_accepted_by_either_alert(tmp_path: Path) -> None:
    """Of the same records, which other policies gave other alerts; each conversation once."""
    ranges = calibrated()
    first = archive_of(tmp_path, make_policy("budget", SETTINGS), ranges)
    again = judged(make_policy("percentile", SETTINGS), ranges)
    write(tmp_path, CONVERSATIONS, rows.conversations_table([again], NAMED, DIRECTIONS_HASH), "f")
    both = frozenset({ids(first)[0], ids(again)[0]})
    assert len(both) == 2
    assert first.scored.rows[0] == again.scored.rows[0]
    found = read_chosen(tmp_path, MODEL, DIRECTIONS_HASH, DIRECTIONS, Choice(both))
    assert found.ids == both
    assert found.segments.conversations == 1


def without_role(table: pa.Table) -> pa.Table:
    """Table `conversations` as schema version 2 had it."""
    metadata = {**(table.schema.metadata or {}), b"deltawatch.schema_version": b"2"}
    return table.drop_columns(["role"]).replace_schema_metadata(metadata)


def test_a_role_that_a_former_version_did_not_write_is_not_missed(tmp_path: Path) -> None:
    policy = make_policy("budget", SETTINGS)
    sent = ids(archive_of(tmp_path, policy, calibrated(), {CONVERSATIONS: without_role}))
    assert explained(tmp_path, sent[0]).reproduced


def by_former_version(table: pa.Table) -> pa.Table:
    """Table `ranges` as schema version 2 had it."""
    metadata = {**(table.schema.metadata or {}), b"deltawatch.schema_version": b"2"}
    columns = ["policy", "settings", "bound", "known", "threshold", "handicap", "window"]
    return table.drop_columns(columns).replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({RANGES: by_former_version}, "an older version wrote it"),
        ({RANGES: altered("ranges_hash", 0, to("0" * 64))}, "has no ranges .* restore its table"),
        ({RANGES: lambda table: table.slice(0, 0)}, "has no ranges .* restore its table"),
        ({CONVERSATIONS: altered("policy", 0, to("budget/0"))}, "has no ranges .* by policy"),
        ({RANGES: altered("settings", 0, to("{}x"))}, "are not those of budget/3"),
        ({CONVERSATIONS: altered("segment_role", 0, to([0]))}, "cannot be read"),
    ],
)
def test_what_cannot_be_recomputed_is_said_in_one_line(
    changes: dict[str, Change],
    words: str,
    tmp_path: Path,
) -> None:
    archive_of(tmp_path, make_policy("budget", SETTINGS), calibrated(), changes)
    with pytest.raises(ConfigurationError, match=words) as caught:
        explain(tmp_path, "conversation 2-0")
    assert "\n" not in str(caught.value)


def test_a_verdict_by_a_policy_that_this_version_has_not_is_not_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("budget", SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(type(policy), "version", 1)
        archive_of(tmp_path, policy, calibrated())
    with pytest.raises(ConfigurationError, match="by policy budget/1, which this version does not"):
        explain(tmp_path, "conversation 2-0")


def test_what_names_nothing_or_too_much_is_refused_in_one_line(tmp_path: Path) -> None:
    pack = archive_of(tmp_path, make_policy("budget", SETTINGS), calibrated())
    unknown = "f" * 64
    assert unknown not in ids(pack)
    for named, words in (
        (unknown, "no alert or conversation"),
        (ids(pack)[0][:7], "8 characters at least"),
        ("", f"beginning of {len(ids(pack))} alerts' ids"),
    ):
        with pytest.raises(ConfigurationError, match=words) as caught:
            explain(tmp_path, named)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="has no table conversations; give the --archive"):
        explain(tmp_path / "elsewhere", unknown)


def test_the_beginning_of_several_ids_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = ids(archive_of(tmp_path, make_policy("percentile", SETTINGS), calibrated()))
    monkeypatch.setattr("pipeline.explaining.SHORTEST", 1)
    (shared, times), *_ = Counter(uid[0] for uid in sent).most_common()
    with pytest.raises(ConfigurationError, match=f"{shared!r} is the beginning of {times} alerts"):
        explain(tmp_path, shared)


def test_a_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    archive_of(tmp_path, make_policy("budget", SETTINGS), calibrated())
    (path,) = (tmp_path / CONVERSATIONS).rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match=r"cannot be read .*\.parquet") as caught:
        explain(tmp_path, "conversation 2-0")
    assert "\n" not in str(caught.value)
