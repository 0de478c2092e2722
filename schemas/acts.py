"""What people do to ranges by hand, and what is kept of it: who, when and why."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class ActKind(StrEnum):
    """What can be done."""

    ACCEPT = "accept"  # call conversations normal that were flagged
    FREEZE = "freeze"  # learn nothing more
    THAW = "thaw"  # learn again
    ROLLBACK = "rollback"  # forget what was learnt after a day
    REVOKE = "revoke"  # take back one accept


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that a person did to the ranges of a model.

    Attributes:
      id: names it; no two have the same.
      kind: what was done.
      model: whose ranges.
      who: did it.
      when_ms: milliseconds since 1970 UTC.
      why: in the person's words.
      ranges_hash: of the ranges of what was accepted; "" for other kinds.
      generation: last one that is kept, for a rollback.
      epoch: the first that is judged by it; None: it has not taken effect yet.
      revoked: id of the accept that is taken back; "" for other kinds.
      done: False: when its time had come it could not be done, and nothing was changed.
    """

    id: str
    kind: ActKind
    model: str
    who: str
    when_ms: int
    why: str
    ranges_hash: str = ""
    generation: int | None = None
    epoch: int | None = None
    revoked: str = ""
    done: bool = True

    def to_json(self) -> dict[str, Any]:
        """As files hold it."""
        return asdict(self)

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Act":
        """Read back what `to_json` gave. Raises ValueError, KeyError or TypeError for others."""
        return Act(**{**document, "kind": ActKind(document["kind"])})
