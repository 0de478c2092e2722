"""Dead letters as JSON: what could not be scored, why, and enough to find or replay it."""

import base64
from typing import Any

from schemas.artefacts import canonical_json
from schemas.ids import dead_letter_id
from schemas.records import DeadLetter
from schemas.text import well_formed
from schemas.version import TOOL_VERSION

MAX_ORIGINAL_BYTES = 64 * 1024
"""Of the record, before base64: keeps a dead letter far below the brokers' usual 1 MB."""

MAX_DETAIL_CHARACTERS = 2000
"""Longer details (they may quote the record) are cut."""


def to_json(letter: DeadLetter) -> dict[str, Any]:
    """The JSON object of a dead letter.

    Its keys are `id, reason, detail, source, partition, offset, event_time, original,
    original_truncated, tool_version`: `event_time` in milliseconds since 1970 UTC or null,
    `original` the record's first `MAX_ORIGINAL_BYTES` bytes in base64, or null where the record
    has none. Repeated for the same record and reason it carries the same `id`.
    """
    position, original = letter.header.position, letter.original
    return {
        "id": dead_letter_id(position, letter.reason),
        "reason": str(letter.reason),
        "detail": well_formed(letter.detail)[:MAX_DETAIL_CHARACTERS],
        "source": position.source,
        "partition": position.partition,
        "offset": position.offset,
        "event_time": letter.header.event_time,
        "original": None if original is None else _base64(original[:MAX_ORIGINAL_BYTES]),
        "original_truncated": original is not None and len(original) > MAX_ORIGINAL_BYTES,
        "tool_version": TOOL_VERSION,
    }


def encode(letter: dict[str, Any]) -> bytes:
    """A dead letter as one line of JSON: ASCII, sorted keys, no line break at the end."""
    return canonical_json(letter)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
