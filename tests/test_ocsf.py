import json
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema
from sample_verdicts import DIRECTIONS_HASH, SampleDirection, sample_directions, sample_pack

from schemas import range_shift
from schemas.describe import describe
from schemas.evidence import Evidence
from schemas.ids import alert_id
from schemas.ocsf import MAX_EVIDENCES, Alert, alerts, encode, to_ocsf
from schemas.range_shift import RangeShift
from schemas.records import (
    Exceedance,
    Header,
    Judgement,
    Position,
    Role,
    ScoredRow,
    Side,
    Status,
)

UNICODE = st.text(st.characters()) | st.just("\ud800") | st.just("\x1b[2J\nFAKE")
STEPS = st.integers(-32767, 32767)
DIRECTION = st.builds(
    SampleDirection,
    st.sampled_from(["O1_u0", "O1_u1", "D23_u6"]),
    st.integers(0, 99),
    st.sampled_from(["o_proj", "down_proj"]),
    st.integers(0, 19),
    st.floats(0, 1e6),
)
EXCEEDANCE = st.builds(
    Exceedance,
    st.sampled_from(Role),
    st.integers(0, 2),
    st.sampled_from(Side),
    STEPS,
    STEPS,
    st.integers(1, 65534),
    st.integers(0, 2**32 - 1),
)
EVIDENCE = st.builds(Evidence, EXCEEDANCE, DIRECTION, st.none() | UNICODE)
TIMES = st.none() | st.integers(0, 2**42)
HEADER = st.builds(
    Header,
    st.builds(Position, UNICODE, st.integers(0, 99), st.integers(0, 2**63 - 1)),
    TIMES,
    TIMES,
    st.integers(0, 10**9),
    st.booleans(),
)
ROW = st.builds(ScoredRow, HEADER, UNICODE, st.integers(1, 10**6), st.booleans(), st.none())
ALERTS = st.builds(
    Alert,
    UNICODE,
    ROW,
    st.sampled_from(Role),
    st.integers(-(10**6), 10**6),
    st.integers(-(10**6), 10**6),
    st.lists(EVIDENCE).map(tuple),
    st.just("budget/3"),
    st.just("ab" * 32),
    st.tuples(st.integers(0, 2**53), st.integers(0, 2**53)),
    st.just(DIRECTIONS_HASH),
)


@cache
def validator() -> jsonschema.Draft202012Validator:
    schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version="1.8.0"))
    name = schema.lookup_class_name_from_uid(2004)
    return jsonschema.Draft202012Validator(schema.get_class_schema(name, profiles=[]))


def errors(event: dict) -> list[str]:
    return [error.message for error in validator().iter_errors(event)]


SHIFTS = st.builds(
    RangeShift,
    st.just("f" * 64),
    UNICODE,
    st.just(DIRECTIONS_HASH),
    st.just("budget/3"),
    st.floats(1e-6, 0.5),
    *[st.integers(0, 10**9)] * 4,
    st.integers(0, 2**42),
)


@given(SHIFTS)
def test_a_range_shift_is_a_valid_event_too(shift: RangeShift) -> None:
    event = range_shift.to_ocsf(shift)
    assert errors(json.loads(encode(event))) == []
    assert event["metadata"]["uid"] == event["finding_info"]["uid"] == shift.id


def flagged(count: int = 1, **changes: object) -> Alert:
    """An alert with `count` exceedances, known in every part."""
    exceedance = Exceedance(Role.ASSISTANT, 0, Side.HIGH, 3277, 1638, 1639, 57)
    direction = SampleDirection("O23_u6", 23, "o_proj", 6, 1.5)
    header = Header(Position("kafka://c/t", 1, 2), 1_700_000_000_000, 1_700_000_060_000, 5, True)
    alert = Alert(
        "badnet",
        ScoredRow(header, "conv-1", 100, False),
        Role.ASSISTANT,
        3000,
        1000,
        (Evidence(exceedance, direction, None),) * count,
        "budget/3",
        "ab" * 32,
        (1812, 640),
        DIRECTIONS_HASH,
    )
    return replace(alert, **changes)


@given(ALERTS, st.integers(0, 2**42))
def test_every_alert_is_a_valid_detection_finding(alert: Alert, clock: int) -> None:
    line = encode(to_ocsf(alert, clock))
    assert b"\n" not in line
    event = json.loads(line)
    assert errors(event) == []
    assert event["finding_info"]["uid"] == event["metadata"]["uid"]
    assert event["finding_info"]["uid"] == alert_id(
        alert.row.header.position, DIRECTIONS_HASH, "budget/3"
    )
    assert line == encode(to_ocsf(alert, clock))


@pytest.mark.parametrize(
    "path",
    [(), ("finding_info",), ("metadata",), ("anomaly_analyses", 0), ("resources", 0),
     ("evidences", 0), ("observables", 0), ("finding_info", "attacks", 0, "technique")],
)  # fmt: skip
def test_a_misspelt_field_fails_the_validation(path: tuple[str | int, ...]) -> None:
    event = to_ocsf(flagged())
    inner = event
    for step in path:
        inner = inner[step]
    inner["misspelt"] = "x"
    assert any("'misspelt' was unexpected" in error for error in errors(event))


@pytest.mark.parametrize(
    "name",
    ["activity_id", "category_uid", "class_uid", "finding_info", "metadata", "severity_id",
     "time", "type_uid"],
)  # fmt: skip
def test_a_missing_field_fails_the_validation(name: str) -> None:
    event = to_ocsf(flagged())
    del event[name]
    assert any(f"'{name}' is a required property" in error for error in errors(event))


def test_an_alert_names_direction_range_token_and_technique() -> None:
    event = to_ocsf(flagged())
    (analysis,) = event["anomaly_analyses"]
    assert analysis["analysis_targets"][0]["name"] == "O23_u6"
    assert float(analysis["anomalies"][0]["observations"][0]["value"]) == pytest.approx(
        3277 / 32767, abs=1e-6
    )
    assert float(analysis["baselines"][0]["observations"][0]["value"]) == pytest.approx(
        1638 / 32767, abs=1e-6
    )
    data = event["evidences"][0]["data"]
    assert (data["token_start"], data["token_end"]) == (57, 58)
    assert [round(data[name] * 32767) for name in ("value", "bound", "margin")] == [
        3277, 1638, 1639,
    ]  # fmt: skip
    assert "excerpt" not in data
    assert event["finding_info"]["attacks"][0]["sub_technique"]["uid"] == "AML.T0018.000"
    assert "consistent with" in event["finding_info"]["desc"]
    assert event["type_uid"] == 200401 and event["is_alert"] is True
    assert event["unmapped"]["role"] == "assistant"
    assert event["metadata"]["version"] == "1.8.0"


def test_an_alert_says_what_it_was_judged_by() -> None:
    event = to_ocsf(flagged())
    assert event["unmapped"]["policy"] == "budget/3"
    assert event["unmapped"]["ranges_hash"] == "ab" * 32
    assert event["unmapped"]["calibrated_on"] == {"user": 1812, "assistant": 640}
    counts = "1,812 conversations with a user, 640 with an assistant"
    assert counts in event["finding_info"]["desc"]


def test_each_exceeded_direction_is_one_target_with_all_its_exceedances() -> None:
    one, two = sample_directions(2)
    found = (
        Evidence(Exceedance(Role.USER, 0, Side.HIGH, 50, 20, 30, 1), one, None),
        Evidence(Exceedance(Role.USER, 1, Side.LOW, -50, -25, 25, 2), two, None),
        Evidence(Exceedance(Role.ASSISTANT, 0, Side.LOW, -40, -30, 10, 3), one, None),
    )
    event = to_ocsf(flagged(evidences=found))
    targets = [part["analysis_targets"][0]["name"] for part in event["anomaly_analyses"]]
    assert targets == [one.name, two.name]
    parameters = [
        anomaly["observation_parameter"] for anomaly in event["anomaly_analyses"][0]["anomalies"]
    ]
    assert parameters == ["highest cosine over user tokens", "lowest cosine over assistant tokens"]
    assert len(event["evidences"]) == 3
    assert [each["data"]["token_start"] for each in event["evidences"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("event_time", "effective_time", "expected"), [(7, 9, 7), (None, 9, 9), (None, None, 5)]
)
def test_time_is_the_records_own_where_it_has_one(
    event_time: int | None, effective_time: int | None, expected: int
) -> None:
    alert = flagged()
    header = replace(alert.row.header, event_time=event_time, effective_time=effective_time)
    event = to_ocsf(replace(alert, row=replace(alert.row, header=header)), clock=5)
    assert event["time"] == event["finding_info"]["created_time"] == expected


@pytest.mark.parametrize(
    ("excess", "severity"),
    [(1, "Low"), (327, "Low"), (328, "Medium"), (1638, "Medium"), (1639, "High"), (10**5, "High")],
)
def test_severity_follows_from_the_distance_to_the_threshold(excess: int, severity: str) -> None:
    event = to_ocsf(flagged(score=-400 + excess, threshold=-400))
    assert event["severity"] == severity
    assert event["severity_id"] == {"Low": 2, "Medium": 3, "High": 4}[severity]


def test_an_alert_with_every_series_exceeded_stays_small() -> None:
    event = to_ocsf(flagged(4 * 1160, evidences=(flagged().evidences[0],) * 4640))
    assert len(event["evidences"]) == MAX_EVIDENCES
    assert event["unmapped"]["exceedances"] == 4640
    assert len(encode(event)) < 100_000


def test_only_flagged_rows_become_alerts_with_all_that_was_judged() -> None:
    positions = [Position("kafka://c/t", 0, offset) for offset in range(30)]
    pack = sample_pack(positions, [1_700_000_000_000] * 30, directions=4, seed=1)
    found = list(alerts(pack, sample_directions(4), DIRECTIONS_HASH))
    expected = [i for i, judgement in enumerate(pack.judgements) if judgement.status == "flagged"]
    assert [alert.row.header.position.offset for alert in found] == expected
    for row, alert in zip(expected, found, strict=True):
        exceedances = pack.judgements[row].exceedances
        assert (alert.ranges_hash, alert.calibrated_on) == (pack.ranges_hash, pack.calibrated_on)
        assert tuple(evidence.exceedance for evidence in alert.evidences) == exceedances
        tokens = [each["data"]["token_start"] for each in to_ocsf(alert)["evidences"]]
        assert tokens == [exceedance.token for exceedance in exceedances]
        for evidence in alert.evidences:
            assert evidence.direction == sample_directions(4)[evidence.exceedance.direction]
            assert evidence.excerpt is None


def test_excerpts_are_made_only_where_asked_for_and_are_short() -> None:
    pack = sample_pack([Position("s", 0, 0)], [0], directions=4, seed=2)
    row = pack.scored.rows[0]
    (alert,) = alerts(
        pack, sample_directions(4), DIRECTIONS_HASH, lambda ids, at: f"{ids[at]}" + "x" * 999
    )
    for evidence in alert.evidences:
        assert evidence.excerpt is not None and row.token_ids is not None
        assert evidence.excerpt.startswith(f"{row.token_ids[evidence.exceedance.token]}x")
        assert len(evidence.excerpt) == 200
    data = to_ocsf(alert)["evidences"][0]["data"]
    assert data["excerpt"] == alert.evidences[0].excerpt


def test_a_flagged_row_without_a_score_is_refused() -> None:
    pack = sample_pack([Position("s", 0, 0)], [0], directions=1, seed=3)
    wrong = replace(pack, judgements=(Judgement(Status.FLAGGED, None, None, None, ()),))
    with pytest.raises(ValueError, match="has role, score and threshold"):
        list(alerts(wrong, sample_directions(1), DIRECTIONS_HASH))


def test_a_person_reads_what_happened_where() -> None:
    text = describe(json.loads(encode(to_ocsf(flagged()))))
    time = datetime.fromtimestamp(1_700_000_000, UTC).isoformat()
    for part in ("conv-1", "badnet", "O23_u6", "assistant tokens", "+0.1000", "at most +0.0500",
                 "token 57", "partition 1 offset 2", time, "High", "budget/3"):  # fmt: skip
        assert part in text
    assert "more in the archive" not in text
    assert "... and 15 more in the archive" in describe(to_ocsf(flagged(20)))


@given(ALERTS)
def test_nothing_from_the_log_can_steer_the_terminal(alert: Alert) -> None:
    lines = describe(to_ocsf(alert)).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 3 + min(len(alert.evidences), 5) + (len(alert.evidences) > 5)
