"""What a person needs to know of an exceedance: the direction's name, the token, the words there.

A judgement speaks of directions by their index and knows no tokens; alerts and the archive's
exceedances both show what this module adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.records import STEPS_PER_UNIT, Exceedance, Int32s, VerdictPack
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
    """An exceedance with its direction's entry and the words where it stands."""

    exceedance: Exceedance
    direction: Direction
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
    token_ids = verdicts.scored.rows[row].token_ids

    def one(exceedance: Exceedance) -> Evidence:
        excerpt = _excerpt(excerpt_of, token_ids, exceedance.token)
        return Evidence(exceedance, directions[exceedance.direction], excerpt)

    return tuple(map(one, verdicts.judgements[row].exceedances))


def _excerpt(excerpt_of: ExcerptOf | None, token_ids: Int32s | None, token: int) -> str | None:
    if excerpt_of is None or token_ids is None:
        return None
    return well_formed(excerpt_of(token_ids, token))[:MAX_EXCERPT_CHARACTERS]
