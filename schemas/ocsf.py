"""Flagged conversations as OCSF 1.8.0 Detection Findings (class 2004), one event each.

What a reader of the events can rely on:

- `finding_info.uid` and `metadata.uid` are the alert id: the same record alerted again carries
  the same id, whatever its scores were the second time.
- `time` is the record's own time; where the log has none its effective time, and where it has
  no times at all the clock of the run's plan, which is recorded: a run repeated after a crash
  writes the same bytes.
- `severity_id` follows from how far the score lies over its threshold, in cosine units: Low
  below one eps (0.01), Medium below five, High from there. Never Critical: a statistic alone
  does not show a compromise. `confidence_score` is left out, as a verdict holds no probability.
- Every exceeded direction is one entry of `anomaly_analyses`, every exceedance one of
  `evidences`, largest margin first; beyond `MAX_EVIDENCES` they are only counted
  (`unmapped.exceedances`) and are found in the archive.
- `unmapped` has what the verdict was made by: the policy, the ranges' hash, and of how many
  conversations they are. `deltawatch explain` makes it again from the archive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from schemas.artefacts import canonical_json
from schemas.evidence import Direction, Evidence, ExcerptOf, cosine, evidence_of
from schemas.ids import alert_id
from schemas.records import Judgement, Role, ScoredRow, Side, Status, VerdictPack
from schemas.text import well_formed
from schemas.version import TOOL_VERSION

OCSF_VERSION = "1.8.0"
MAX_EVIDENCES = 64
"""Keeps an event below 100 kB, far from the brokers' usual 1 MB."""

_EPS = 0.01  # the method's own tolerance, in cosine units
_SEVERITIES = ((1 * _EPS, 2, "Low"), (5 * _EPS, 3, "Medium"))
_HIGH = (4, "High")
_SIMILARITY = "cosine similarity of the residual stream with the direction"
_ATLAS = "https://atlas.mitre.org/techniques/"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Alert:
    """A flagged conversation and everything its event is made from."""

    model: str
    row: ScoredRow
    role: Role  # the role that decided
    score: int  # steps
    threshold: int  # steps
    evidences: tuple[Evidence, ...]  # largest margin first
    policy: str  # "name/version"
    ranges_hash: str
    calibrated_on: tuple[int, int]  # conversations with a user, with an assistant
    directions_hash: str


def alerts(
    verdicts: VerdictPack,
    directions: Sequence[Direction],
    directions_hash: str,
    excerpt_of: ExcerptOf | None = None,
) -> Iterator[Alert]:
    """The alerts of a judged pack: one for every flagged row, in the pack's order.

    Args:
      verdicts: a judged pack.
      directions: the artefact's entries in stored order.
      directions_hash: of that artefact.
      excerpt_of: makes excerpts of rows that kept their token ids; None makes none.

    Raises:
      ValueError: a flagged row has no score, threshold or role.
    """
    scored = verdicts.scored
    for index, judgement in enumerate(verdicts.judgements):
        if judgement.status is Status.FLAGGED:
            yield Alert(
                scored.model,
                scored.rows[index],
                *_decision(judgement),
                evidence_of(verdicts, index, directions, excerpt_of),
                verdicts.policy,
                verdicts.ranges_hash,
                verdicts.calibrated_on,
                directions_hash,
            )


def to_ocsf(alert: Alert, clock: int = 0) -> Json:
    """The event of one alert.

    Args:
      alert: a flagged conversation.
      clock: milliseconds since 1970 UTC, for logs without times; must be the same in a re-run.
    """
    uid = alert_id(alert.row.header.position, alert.directions_hash, alert.policy)
    time = _time(alert, clock)
    severity_id, severity = _severity(_excess(alert))
    shown = alert.evidences[:MAX_EVIDENCES]
    return {
        **classification(),
        "severity_id": severity_id,
        "severity": severity,
        "time": time,
        "message": _title(alert),
        "finding_info": _finding_info(alert, uid, time),
        "anomaly_analyses": _anomaly_analyses(shown),
        "evidences": [_evidence(evidence) for evidence in shown],
        "resources": _resources(alert),
        "observables": _observables(alert),
        "metadata": _metadata(alert, uid),
        "unmapped": _unmapped(alert),
    }


def encode(event: Json) -> bytes:
    """An event as one line of JSON: ASCII, sorted keys, no line break at the end."""
    return canonical_json(event)


def classification() -> Json:
    """What all events have in common."""
    return {
        "activity_id": 1,
        "activity_name": "Create",
        "category_uid": 2,
        "category_name": "Findings",
        "class_uid": 2004,
        "class_name": "Detection Finding",
        "type_uid": 200401,
        "type_name": "Detection Finding: Create",
        "status_id": 1,
        "status": "New",
        "is_alert": True,
    }


def _decision(judgement: Judgement) -> tuple[Role, int, int]:
    role, score, threshold = judgement.role, judgement.score, judgement.threshold
    if role is None or score is None or threshold is None:
        raise ValueError(f"a flagged conversation has role, score and threshold, not {judgement}")
    return role, score, threshold


def _excess(alert: Alert) -> float:
    """How far the score lies over its threshold, in cosine units."""
    return cosine(alert.score - alert.threshold)


def _severity(excess: float) -> tuple[int, str]:
    for below, severity_id, severity in _SEVERITIES:
        if excess < below:
            return severity_id, severity
    return _HIGH


def _time(alert: Alert, clock: int) -> int:
    header = alert.row.header
    times = (header.event_time, header.effective_time, clock)
    return next(time for time in times if time is not None)


def _title(alert: Alert) -> str:
    conversation, model = (
        well_formed(alert.row.conversation_id),
        well_formed(alert.model),
    )
    return f"Conversation {conversation} drives model {model} outside its calibrated ranges"


def _finding_info(alert: Alert, uid: str, time: int) -> Json:
    return {
        "uid": uid,
        "title": _title(alert),
        "desc": _description(alert),
        "created_time": time,
        "first_seen_time": time,
        "analytic": {
            "type_id": 3,
            "type": "Statistical",
            "uid": f"deltawatch/{alert.policy}",
            "name": "Cosines with fine-tuning directions against calibrated ranges",
            "version": TOOL_VERSION,
        },
        "attacks": _attacks(),
        "tags": [{"name": "owasp_llm", "value": "LLM04:2025"}],
        "types": ["Model behaviour anomaly"],
    }


def _attacks() -> list[Json]:
    return [
        {
            "technique": {
                "uid": "AML.T0018",
                "name": "Manipulate AI Model",
                "src_url": f"{_ATLAS}AML.T0018",
            },
            "sub_technique": {
                "uid": "AML.T0018.000",
                "name": "Poison AI Model",
                "src_url": f"{_ATLAS}AML.T0018.000",
            },
        }
    ]


def _description(alert: Alert) -> str:
    count = len({evidence.direction.name for evidence in alert.evidences})
    strongest = f" Strongest: {_sentence(alert.evidences[0])}" if alert.evidences else ""
    return (
        f"This conversation moves the model along {count} of the directions that fine-tuning "
        f"added to it further than the calibrated traffic did ({_calibration(alert)}).{strongest} "
        "That is consistent with a behaviour planted in the fine-tuned weights being triggered "
        "(MITRE ATLAS AML.T0018.000, Poison AI Model); rare harmless content can look the same. "
        "Read the conversation at the tokens named in the evidences, and look in the archive "
        "for other conversations that exceed the same directions."
    )


def _calibration(alert: Alert) -> str:
    user, assistant = alert.calibrated_on
    return f"{user:,} conversations with a user, {assistant:,} with an assistant"


def _sentence(evidence: Evidence) -> str:
    exceedance, direction = evidence.exceedance, evidence.direction
    return (
        f"{direction.name} ({direction.kind}, layer {direction.layer}): {_parameter(evidence)} "
        f"is {cosine(exceedance.value):+.4f} at token {exceedance.token}, "
        f"expected {_range(evidence)}."
    )


def _role(role: Role) -> str:
    return role.name.lower()


def _parameter(evidence: Evidence) -> str:
    end = "highest" if evidence.exceedance.side is Side.HIGH else "lowest"
    return f"{end} cosine over {_role(evidence.exceedance.role)} tokens"


def _range(evidence: Evidence) -> str:
    word = "at most" if evidence.exceedance.side is Side.HIGH else "at least"
    return f"{word} {cosine(evidence.exceedance.bound):+.4f}"


def _anomaly_analyses(evidences: Sequence[Evidence]) -> list[Json]:
    by_direction: dict[str, list[Evidence]] = {}
    for evidence in evidences:
        by_direction.setdefault(evidence.direction.name, []).append(evidence)
    return [
        {
            "analysis_targets": [{"name": name, "type": "residual stream direction"}],
            "anomalies": [_anomaly(evidence) for evidence in group],
            "baselines": [_baseline(evidence) for evidence in group],
        }
        for name, group in by_direction.items()
    ]


def _anomaly(evidence: Evidence) -> Json:
    margin = cosine(evidence.exceedance.margin)
    return {
        "observation_parameter": _parameter(evidence),
        "observation_type": _SIMILARITY,
        "observations": [{"value": f"{cosine(evidence.exceedance.value):+.6f}", "count": 1}],
        "observed_pattern": f"outside its range by {margin:.6f}",
    }


def _baseline(evidence: Evidence) -> Json:
    return {
        "observation_parameter": _parameter(evidence),
        "observation_type": _SIMILARITY,
        "observations": [{"value": f"{cosine(evidence.exceedance.bound):+.6f}"}],
        "observed_pattern": f"expected {_range(evidence)}",
    }


def _evidence(evidence: Evidence) -> Json:
    exceedance, direction = evidence.exceedance, evidence.direction
    data = {
        "direction": direction.name,
        "layer": direction.layer,
        "kind": direction.kind,
        "rank_index": direction.index,
        "singular_value": direction.singular_value,
        "role": _role(exceedance.role),
        "side": exceedance.side.value,
        "value": cosine(exceedance.value),
        "bound": cosine(exceedance.bound),
        "margin": cosine(exceedance.margin),
        "token_start": exceedance.token,
        "token_end": exceedance.token + 1,
    }
    excerpt = {} if evidence.excerpt is None else {"excerpt": evidence.excerpt}
    return {
        "name": f"{direction.name} on {_role(exceedance.role)} tokens",
        "data": data | excerpt,
    }


def _resources(alert: Alert) -> list[Json]:
    position = alert.row.header.position
    conversation = {
        "type": "conversation",
        "uid": well_formed(alert.row.conversation_id),
        "role_id": 3,
        "role": "Affected",
        "data": {
            "source": position.source,
            "partition": position.partition,
            "offset": position.offset,
            "tokens": alert.row.tokens,
            "truncated": alert.row.truncated,
        },
    }
    return [conversation, model_resource(alert.model, alert.directions_hash)]


def model_resource(model: str, directions_hash: str) -> Json:
    """A monitored model, as a resource."""
    return {
        "type": "AI model",
        "name": well_formed(model),
        "role_id": 4,
        "role": "Related",
        "data": {"directions_hash": directions_hash},
    }


def _observables(alert: Alert) -> list[Json]:
    return [
        {
            "name": "resources.uid",
            "type_id": 10,
            "type": "Resource UID",
            "value": well_formed(alert.row.conversation_id),
        },
        {
            "name": "resources.name",
            "type_id": 38,
            "type": "Resource Details Object: name",
            "value": well_formed(alert.model),
        },
    ]


def _metadata(alert: Alert, uid: str) -> Json:
    position = alert.row.header.position
    return {
        "uid": uid,
        **product(),
        "log_source": position.source,
        "original_event_uid": f"{position.source}/{position.partition}/{position.offset}",
        "correlation_uid": well_formed(alert.row.conversation_id),
    }


def product() -> Json:
    """What made an event, as its metadata say it."""
    return {
        "version": OCSF_VERSION,
        "product": {
            "name": "deltawatch",
            "vendor_name": "deltawatch",
            "version": TOOL_VERSION,
        },
        "log_provider": "deltawatch",
        "log_name": "alerts",
    }


def _unmapped(alert: Alert) -> Json:
    """deltawatch's own fields; scores in cosine units."""
    return {
        "score": cosine(alert.score),
        "threshold": cosine(alert.threshold),
        "excess": _excess(alert),
        "role": _role(alert.role),
        "exceedances": len(alert.evidences),
        "policy": alert.policy,
        "ranges_hash": alert.ranges_hash,
        "calibrated_on": {_role(role): alert.calibrated_on[role] for role in Role},
        "directions_hash": alert.directions_hash,
        "epoch": alert.row.header.epoch,
        "late": alert.row.header.late,
    }
