"""Deterministic ids of what is delivered at least once, so that a receiver can drop repeats.

An id is the SHA-256, in hexadecimal, of a canonical JSON list: JSON keeps the parts apart, so
two different lists never have the same bytes. Scores take no part, since scoring again may
change the last step of a cosine.
"""

import hashlib

from schemas.artefacts import canonical_json
from schemas.records import Position


def alert_id(position: Position, directions_hash: str, policy: str) -> str:
    """Id of the alert about one record: 64 hexadecimal characters.

    Args:
      position: of the record; its source already holds the cluster id or the file's hash.
      directions_hash: of the directions the record was scored with.
      policy: "name/version".
    """
    return _digest("alert", position, directions_hash, policy)


def dead_letter_id(position: Position, reason: str) -> str:
    """Id of the dead letter of one record for one reason: 64 hexadecimal characters."""
    return _digest("dead-letter", position, reason)


def _digest(kind: str, position: Position, *parts: str) -> str:
    fields = [kind, position.source, position.partition, position.offset, *parts]
    return hashlib.sha256(canonical_json(fields)).hexdigest()
