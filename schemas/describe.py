"""An alert as a few lines of text, for a person at a terminal."""

from datetime import UTC, datetime
from typing import Any

from schemas.text import printable

_SHOWN = 5


def describe(event: dict[str, Any]) -> str:
    """What an alert says: conversation, score, and directions with value, range and token.

    Args:
      event: an OCSF event as `schemas.ocsf.to_ocsf` makes it, or read back from its JSON.

    Returns:
      Lines without a line break at the end; nothing from the log can steer the terminal.
    """
    evidences = event["evidences"]
    hidden = event["unmapped"]["exceedances"] - min(len(evidences), _SHOWN)
    lines = [*_heading(event), *map(_direction, evidences[:_SHOWN])]
    if hidden > 0:
        lines.append(f"  ... and {hidden} more in the archive (table exceedances)")
    return "\n".join(lines)


def _heading(event: dict[str, Any]) -> list[str]:
    conversation, model = event["resources"]
    place, own = conversation["data"], event["unmapped"]
    time = datetime.fromtimestamp(event["time"] / 1000, UTC).isoformat(timespec="seconds")
    return [
        f"FLAGGED conversation {printable(conversation['uid'])}  "
        f"(severity {event['severity']}, {time})",
        f"  model {printable(model['name'])}; log {printable(place['source'])} "
        f"partition {place['partition']} offset {place['offset']}",
        f"  score {own['score']:.4f} over threshold {own['threshold']:.4f} on {own['role']} tokens"
        f" (policy {own['policy']}); alert {event['finding_info']['uid']}",
    ]


def _direction(evidence: dict[str, Any]) -> str:
    data = evidence["data"]
    expected = "at most" if data["side"] == "high" else "at least"
    excerpt = ': "' + printable(data["excerpt"]) + '"' if "excerpt" in data else ""
    return (
        f"  {data['direction']} ({data['kind']}, layer {data['layer']}) on {data['role']} tokens: "
        f"{data['value']:+.4f}, expected {expected} {data['bound']:+.4f}, "
        f"at token {data['token_start']}{excerpt}"
    )
