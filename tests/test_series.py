"""Series against a loop over roles, directions and sides."""

import numpy as np

from schemas.records import ABSENT, Cosines, Role, Side
from transforms.ranges.series import (
    per_series,
    role_columns,
    roles_present,
    series_at,
    series_of_role,
    series_values,
)

DIRECTIONS = 3


def cosines(rows: int = 4) -> Cosines:
    """Random cosines; the first conversation has no assistant, the second no user."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(-32767, 32768, (rows, 2 * DIRECTIONS, 2)), axis=2).astype(np.int16)
    ends[0, DIRECTIONS:] = ABSENT
    ends[1, :DIRECTIONS] = ABSENT
    nowhere = np.zeros((rows, 2 * DIRECTIONS), np.uint32)
    return Cosines(ends[:, :, 0], ends[:, :, 1], nowhere, nowhere)


def test_every_value_is_the_extreme_its_series_is_about() -> None:
    given = cosines()
    values = series_values(given)
    assert values.shape == (4, 4 * DIRECTIONS)
    assert values.dtype == np.int32
    for (row, index), value in np.ndenumerate(values):
        series = series_at(index, DIRECTIONS)
        column = series.role * DIRECTIONS + series.direction
        cosine = (given.high if series.side is Side.HIGH else given.low)[row, column]
        assert value == ABSENT if cosine == ABSENT else series.cosine(int(value)) == cosine


def test_every_series_belongs_to_one_role() -> None:
    series = np.concatenate([series_of_role(role, DIRECTIONS) for role in Role])
    assert sorted(series) == list(range(4 * DIRECTIONS))
    for role in Role:
        assert {series_at(i, DIRECTIONS).role for i in series_of_role(role, DIRECTIONS)} == {role}


def test_columns_of_a_role_are_its_series() -> None:
    values = series_values(cosines())
    for role in Role:
        expected = values[:, series_of_role(role, DIRECTIONS)]
        np.testing.assert_array_equal(role_columns(values, role), expected)


def test_roles_present_and_numbers_per_series() -> None:
    values = series_values(cosines())
    assert roles_present(values).tolist() == [[True, False], [False, True], [True] * 2, [True] * 2]
    spread = per_series(np.array([7, 9]), DIRECTIONS)
    expected = [(7, 9)[series_at(i, DIRECTIONS).role] for i in range(4 * DIRECTIONS)]
    assert spread.tolist() == expected
