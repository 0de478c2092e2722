"""What is left of a run that was disturbed, against one that was not."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from outcome import Messages, Outcome, consumed


@dataclass(frozen=True)
class Left:
    """Everything a run left.

    Attributes:
      rows: of `conversations` and `exceedances`.
      files: content of the archive's files by path.
      alerts: keys and values on the alerts topic, repeats included.
      dead: likewise on the dead-letter topic.
      reasons: why records were not scored, by the commit.
      total: the ledger.
      ranges: hash of the ranges of closed epochs.
    """

    rows: dict[str, list[dict[str, Any]]]
    files: dict[str, bytes]
    alerts: Messages
    dead: Messages
    reasons: dict[str, int]
    total: Any
    ranges: str

    @staticmethod
    def by(run: Outcome, bootstrap: str) -> "Left":
        """Read it all back."""
        dead = consumed(bootstrap, run.job.dead_letters.rpartition("/")[2])
        return Left(
            {table: run.rows(table) for table in ("conversations", "exceedances")},
            run.files(),
            consumed(bootstrap, run.job.alerts.rpartition("/")[2]),
            [(key, _timeless(value)) for key, value in dead],
            dict(run.commit.reasons),
            run.commit.total_ledger,
            run.ranges.hash,
        )


@dataclass
class Differences:
    """Between disturbed runs and the undisturbed one; all zero and true is what is promised."""

    lost: int = 0
    changed_verdicts: int = 0
    changed_ids: int = 0
    ranges_equal: bool = True
    ledgers_equal: bool = True

    def add(self, left: Left, right: Left) -> str:
        """Compare one run with the undisturbed one; a line that says what was found."""
        mine, theirs = left.rows["conversations"], right.rows["conversations"]
        lost = abs(len(mine) - len(theirs)) + _apart(left.dead, right.dead)
        changed = sum(a != b for a, b in zip(mine, theirs, strict=False))
        changed += left.rows["exceedances"] != right.rows["exceedances"]
        ids = _apart(left.alerts, right.alerts) + _repeats_that_differ(left)
        ranges = left.ranges == right.ranges and left.files == right.files
        ledgers = (left.total, left.reasons) == (right.total, right.reasons)
        self.lost += lost
        self.changed_verdicts += changed
        self.changed_ids += ids
        self.ranges_equal &= ranges
        self.ledgers_equal &= ledgers
        repeated = len(left.alerts) - len(dict(left.alerts))
        return (
            f"{len(mine)} rows, {lost} lost, {changed} changed verdicts, {ids} changed ids, "
            f"{repeated} alerts repeated, archive and ranges {_same(ranges)}, "
            f"ledger {_same(ledgers)}"
        )


def _timeless(letter: bytes) -> bytes:
    """Without the words, in which the clock of the slice may be."""
    return json.dumps({**json.loads(letter), "detail": ""}).encode()


def _apart(one: Messages, other: Messages) -> int:
    """Messages that only one of them has, repeats not counted."""
    return len(set(one) ^ set(other))


def _repeats_that_differ(left: Left) -> int:
    values = Counter(key for key, _ in set(left.alerts) | set(left.dead))
    return sum(count > 1 for count in values.values())


def _same(equal: bool) -> str:
    return "the same" if equal else "DIFFERENT"
