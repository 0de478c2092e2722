"""What a person needs to know of an exceedance: the direction's name, the token, the words there.

A judgement speaks of directions by their index and knows no tokens; alerts and the archive's
exceedances both show what this module adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.records import STEPS_PER_UNIT, Exceedance, Int32s, Side, VerdictPack
from schemas.text import well_formed

MAX_EXCERPT_CHARACTERS = 200
"""Longer excerpts are cut: alerts carry a hint, not the conversation."""

ExcerptOf = Callable[[Int32s, int], str]
"""The text around a token, from a conversation's token ids [tokens] and the token's position."""


class Direction(Protocol):
    """An entry of the directions artefact."""

    @property
    def name(self) -> str:
        """As in the paper, e.g. `O23_u6`."""

    @property
    def layer(self) -> int:
        """Decoder layer, from 0."""

    @property
    def kind(self) -> str:
        """Which matrix of the layer it comes from."""

    @property
    def index(self) -> int:
        """Rank of its singular value in that matrix, from 0."""

    @property
    def singular_value(self) -> float:
        """Of the matrix difference."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """An exceedance with its direction's entry and the token where it stands."""

    exceedance: Exceedance
    direction: Direction
    token: int  # position in the conversation, from 0
    excerpt: str | None  # None unless excerpts were asked for


def cosine(steps: int) -> float:
    """Steps as a cosine to six decimals: enough to get the steps back by rounding."""
    return round(steps / STEPS_PER_UNIT, 6)


def evidence_of(
    verdicts: VerdictPack,
    row: int,
    directions: Sequence[Direction],
    excerpt_of: ExcerptOf | None = None,
) -> tuple[Evidence, ...]:
    """Evidence for every exceedance of one row, in the judgement's order.

    Args:
      verdicts: a judged pack.
      row: index of a conversation in it.
      directions: the artefact's entries in stored order.
      excerpt_of: makes excerpts of rows that kept their token ids; None makes none.
    """
    cosines, scored = verdicts.scored.cosines, verdicts.scored.rows[row]

    def one(exceedance: Exceedance) -> Evidence:
        places = cosines.high_at if exceedance.side is Side.HIGH else cosines.low_at
        column = exceedance.role * len(directions) + exceedance.direction
        token = int(places[row, column])
        excerpt = _excerpt(excerpt_of, scored.token_ids, token)
        return Evidence(exceedance, directions[exceedance.direction], token, excerpt)

    return tuple(map(one, verdicts.judgements[row].exceedances))


def _excerpt(excerpt_of: ExcerptOf | None, token_ids: Int32s | None, token: int) -> str | None:
    if excerpt_of is None or token_ids is None:
        return None
    return well_formed(excerpt_of(token_ids, token))[:MAX_EXCERPT_CHARACTERS]
