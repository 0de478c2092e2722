"""Series: one number per conversation for every (role, direction, side).

A series holds a conversation's highest cosine, or its lowest one negated, so that every question
about it is a question about one upper tail. With D directions there are 4D series, in this order:
high USER [D], high ASSISTANT [D], low USER negated [D], low ASSISTANT negated [D].
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Cosines, Int32s, Role, Side

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


def series_values(cosines: Cosines) -> Int32s:
    """Values of all series, in steps, int32 [n, 4D]; ABSENT where the role has no tokens."""
    low = cosines.low.astype(np.int32)
    low = np.where(low == ABSENT, ABSENT, -low)
    return np.concatenate([cosines.high.astype(np.int32), low], axis=1)


def series_at(index: int, directions: int) -> Series:
    """The series that stands at `index` of 4 * `directions`."""
    side, role = divmod(index // directions, len(Role))
    return Series(Role(role), index % directions, Side.LOW if side else Side.HIGH)


def series_of_role(role: Role, directions: int) -> NDArray[np.intp]:
    """Indices of a role's 2 * `directions` series, ascending."""
    return np.arange(PER_DIRECTION * directions).reshape(2, len(Role), directions)[:, role].ravel()


def role_columns(values: NDArray[np.signedinteger], role: Role) -> NDArray[np.signedinteger]:
    """The columns [n, 2D] of [n, 4D] that belong to a role, ordered as `series_of_role`."""
    rows, series = values.shape
    directions = series // PER_DIRECTION
    by_role = values.reshape(rows, 2, len(Role), directions)[:, :, role]
    return by_role.reshape(rows, 2 * directions)


def roles_present(values: NDArray[np.signedinteger]) -> NDArray[np.bool_]:
    """Whether each role has tokens, bool [n, 2]. `values` is [n, 4D]."""
    # A role's series are present together, so one of them answers for all.
    directions = values.shape[1] // PER_DIRECTION
    return values[:, [role * directions for role in Role]] != ABSENT


def per_series(by_role: NDArray[np.int64], directions: int) -> NDArray[np.int64]:
    """Numbers [2] a role each, spread over the 4 * `directions` series."""
    return np.tile(np.repeat(by_role, directions), 2)
