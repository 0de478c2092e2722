"""A `range_shift` as an OCSF Detection Finding: far more conversations are flagged than asked for.

It is about a model's traffic as a whole, not about a conversation: either normal traffic has become
another, or someone floods the model.
"""

from dataclasses import dataclass

from schemas.ocsf import Json, classification, model_resource, product
from schemas.text import well_formed

_MEDIUM = (3, "Medium")


@dataclass(frozen=True, slots=True)
class RangeShift:
    """What is to be said of it.

    Attributes:
      id: 64 hexadecimal characters.
      model: whose traffic it is.
      directions_hash: of its directions.
      policy: "name/version".
      rate: share of normal conversations that may be flagged.
      since: first epoch with far more.
      epoch: in which they became too many.
      judged: conversations from one to the other.
      flagged: of these.
      time: end of that epoch, milliseconds since 1970 UTC.
    """

    id: str
    model: str
    directions_hash: str
    policy: str
    rate: float
    since: int
    epoch: int
    judged: int
    flagged: int
    time: int

    @property
    def share(self) -> float:
        """Of flagged conversations."""
        return self.flagged / max(self.judged, 1)


def to_ocsf(shift: RangeShift) -> Json:
    """The event."""
    severity_id, severity = _MEDIUM
    return {
        **classification(),
        "severity_id": severity_id,
        "severity": severity,
        "time": shift.time,
        "message": _title(shift),
        "finding_info": _finding_info(shift),
        "resources": [model_resource(shift.model, shift.directions_hash)],
        "metadata": {"uid": shift.id, **product(), "correlation_uid": well_formed(shift.model)},
        "unmapped": {
            "event": "range_shift",
            "policy": shift.policy,
            "rate": shift.rate,
            "judged": shift.judged,
            "flagged": shift.flagged,
            "since_epoch": shift.since,
            "epoch": shift.epoch,
            "directions_hash": shift.directions_hash,
        },
    }


def _title(shift: RangeShift) -> str:
    return f"Far more conversations of model {well_formed(shift.model)} are flagged than asked for"


def _finding_info(shift: RangeShift) -> Json:
    return {
        "uid": shift.id,
        "title": _title(shift),
        "desc": (
            f"{shift.flagged} of {shift.judged} conversations judged since epoch {shift.since} "
            f"were flagged ({shift.share:.1%}); {shift.rate:.2%} were asked for. Either normal "
            "traffic has become another (a new product, a new language), or a planted behaviour "
            "is used again and again. Read some of these alerts. If they are normal, `deltawatch "
            "ranges accept` takes them into the ranges; if they are not, nothing has to be done "
            "to the ranges: flagged conversations do not widen them."
        ),
        "created_time": shift.time,
        "analytic": {
            "type_id": 3,
            "type": "Statistical",
            "uid": f"deltawatch/range_shift/{shift.policy}",
            "name": "Cumulative sum of flagged conversations beyond the rate asked for",
        },
        "types": ["Model traffic shift"],
    }
