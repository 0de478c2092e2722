"""Deterministic ids of what is delivered at least once, so that a receiver can drop repeats.

An id is the SHA-256, in hexadecimal, of a canonical JSON list: JSON keeps the parts apart, so
two different lists never have the same bytes. Scores take no part, since scoring again may
change the last step of a cosine.
"""

import hashlib
from collections.abc import Sequence

from schemas.artefacts import canonical_json
from schemas.records import Position


def alert_id(position: Position, directions_hash: str, policy: str) -> str:
    """Id of the alert about one record: 64 hexadecimal characters.

    Args:
      position: of the record; its source already holds the cluster id or the file's hash.
      directions_hash: of the directions the record was scored with.
      policy: "name/version".
    """
    return _digest("alert", *_place(position), directions_hash, policy)


def range_shift_id(
    partitions: Sequence[str], model: str, directions_hash: str, policy: str, epoch: int
) -> str:
    """Id of the event about a model's traffic in one epoch: 64 hexadecimal characters.

    Args:
      partitions: that are read, as "source/partition", in order.
      model: its name.
      directions_hash: of its directions.
      policy: "name/version".
      epoch: in which it was raised.
    """
    return _digest("range-shift", *partitions, model, directions_hash, policy, epoch)


def dead_letter_id(position: Position, reason: str) -> str:
    """Id of the dead letter of one record for one reason: 64 hexadecimal characters."""
    return _digest("dead-letter", *_place(position), reason)


def _place(position: Position) -> tuple[str, int, int]:
    return position.source, position.partition, position.offset


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(canonical_json(parts)).hexdigest()
