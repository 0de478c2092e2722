"""Series: one number per stretch of tokens for every (role, direction, side).

A stretch is a segment, or all tokens that a conversation has of a role. A series holds a stretch's
highest cosine, or its lowest one negated, so that every question about it is a question about one
upper tail. With D directions there are 4D series, in this order: high USER [D], high ASSISTANT [D],
low USER negated [D], low ASSISTANT negated [D].
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.records import Int8s, Int16s, Int32s, Role, Segments, Side

PER_DIRECTION = 4
"""Series a direction has: two roles, two sides."""


class Series(NamedTuple):
    """What a series is about."""

    role: Role
    direction: int  # index in the directions artefact
    side: Side

    def cosine(self, value: int) -> int:
        """A value of the series, in steps, with the sign the cosine has."""
        return value if self.side is Side.HIGH else -value


@dataclass(frozen=True, eq=False, slots=True)
class Stretches:
    """The values that stretches of tokens, S of them, have in the series of their role.

    Attributes:
      conversations: how many the stretches are of; one may have none.
      row: which of them, int32 [S], ascending.
      role: values of `Role`, int8 [S].
      values: steps, int16 [S, 2D], in the order of `series_of_role`.
    """

    conversations: int
    row: Int32s
    role: Int8s
    values: Int16s

    @staticmethod
    def of(segments: Segments) -> "Stretches":
        """A stretch for every segment."""
        values = np.concatenate([segments.high, -segments.low], axis=1)
        return Stretches(segments.conversations, segments.row, segments.role, values)

    def spread(self, most: int) -> "Stretches":
        """At most so many of a role for each conversation, evenly spread over it."""
        order, begins, numbers = self._by_role()
        place = np.arange(len(order)) - np.repeat(begins, numbers)
        number = np.repeat(numbers, numbers)
        kept = np.sort(order[(place + 1) * most // number > place * most // number])
        return Stretches(self.conversations, self.row[kept], self.role[kept], self.values[kept])

    def whole(self) -> "Stretches":
        """One stretch for all tokens that a conversation has of a role."""
        if not len(self.row):
            return self
        order, begins, numbers = self._by_role()
        first = order[begins]
        values = self.values[first]
        # One after the other, of all conversations at a time; reduceat takes ten times as long.
        for place in range(1, numbers.max()):
            longer = np.flatnonzero(numbers > place)
            further = self.values[order[begins[longer] + place]]
            values[longer] = np.maximum(values[longer], further)
        return Stretches(self.conversations, self.row[first], self.role[first], values)

    def _by_role(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """An order by conversation and role; where in it each role of one begins, and how many."""
        key = self.row.astype(np.int64) * len(Role) + self.role
        order = np.argsort(key, kind="stable")
        _, begins, numbers = np.unique(key[order], return_index=True, return_counts=True)
        return order, begins, numbers

    def of_conversations(self, chosen: NDArray[np.bool_]) -> "Stretches":
        """Those of the chosen conversations, bool [conversations]; the others then have none."""
        kept = chosen[self.row]
        return Stretches(self.conversations, self.row[kept], self.role[kept], self.values[kept])

    def present(self) -> NDArray[np.bool_]:
        """Whether conversations have tokens of each role, bool [conversations, 2]."""
        present = np.zeros((self.conversations, len(Role)), np.bool_)
        present[self.row, self.role] = True
        return present


def series_at(index: int, directions: int) -> Series:
    """The series that stands at `index` of 4 * `directions`."""
    side, role = divmod(index // directions, len(Role))
    return Series(Role(role), index % directions, Side.LOW if side else Side.HIGH)


def series_of_role(role: Role, directions: int) -> NDArray[np.intp]:
    """Indices of a role's 2 * `directions` series, ascending."""
    return np.arange(PER_DIRECTION * directions).reshape(2, len(Role), directions)[:, role].ravel()


def per_series(by_role: NDArray[np.int64], directions: int) -> NDArray[np.int64]:
    """Numbers [2] a role each, spread over the 4 * `directions` series."""
    return np.tile(np.repeat(by_role, directions), 2)
