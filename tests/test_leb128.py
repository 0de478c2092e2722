"""LEB128 against numbers taken apart in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.ranges.leb128 import decoded, encoded

NUMBERS = st.lists(
    st.integers(0, 63).flatmap(lambda bits: st.integers((1 << bits) >> 1, (1 << bits) - 1))
)


def bytes_of(number: int) -> list[int]:
    """A number's sevens of bits, the lowest first, all but the last with 128 added."""
    sevens = [number & 127]
    while number := number >> 7:
        sevens.append(number & 127)
    return [each + 128 for each in sevens[:-1]] + sevens[-1:]


@given(NUMBERS)
def test_bytes_are_those_of_every_number_taken_apart(numbers: list[int]) -> None:
    data = encoded(np.array(numbers, np.int64))
    assert data.dtype == np.uint8
    assert data.tolist() == [byte for number in numbers for byte in bytes_of(number)]
    again = decoded(data)
    assert again.dtype == np.int64
    assert again.tolist() == numbers


def test_examples_of_the_standard() -> None:
    # DWARF 5, figure 22.
    numbers = [2, 127, 128, 129, 12857]
    data = [2, 127, 0 + 128, 1, 1 + 128, 1, 57 + 128, 100]
    assert encoded(np.array(numbers)).tolist() == data
    assert decoded(np.array(data, np.uint8)).tolist() == numbers


@pytest.mark.parametrize("data", [[128], [1, 200], [255] * 9 + [1], [1, *[128] * 9, 0]])
def test_bytes_that_are_no_numbers_are_refused(data: list[int]) -> None:
    with pytest.raises(ValueError, match="no numbers"):
        decoded(np.array(data, np.uint8))
