"""LEB128: whole numbers as bytes, each in as few as it needs.

A byte holds seven bits of a number, the lowest first; the eighth is set in all bytes of a number
but its last (DWARF 5, section 7.6; the varint of Protocol Buffers).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_BITS: Final = 7
_LOW: Final = 127
_MORE: Final = 128
_LONGEST: Final = 9  # bytes; the numbers then fit into int64

UInt8s = NDArray[np.uint8]
Int64s = NDArray[np.int64]


def encoded(numbers: Int64s) -> UInt8s:
    """The bytes, uint8 [b], of numbers int64 [n] from 0 on, one number after the other."""
    sizes = _sizes(numbers)
    data = np.empty(sizes.sum(), np.uint8)
    at = np.cumsum(sizes) - sizes
    while len(numbers):
        more = numbers >= _MORE
        data[at] = numbers & _LOW | more * _MORE
        at, numbers = at[more] + 1, numbers[more] >> _BITS
    return data


def decoded(data: UInt8s) -> Int64s:
    """The numbers, int64 [n], that `encoded` gave bytes for.

    Raises:
      ValueError: the last number has no end, or one is too long.
    """
    ends = np.flatnonzero(data < _MORE) + 1
    sizes = np.diff(ends, prepend=0)
    longest = int(sizes.max(initial=0))
    if sizes.sum() != len(data) or longest > _LONGEST:
        raise ValueError("bytes that are no numbers")
    begins = ends - sizes
    numbers = np.zeros(len(ends), np.int64)
    for place in range(longest):
        longer = np.flatnonzero(sizes > place)
        bits = data[begins[longer] + place] & _LOW
        numbers[longer] |= bits.astype(np.int64) << _BITS * place
    return numbers


def _sizes(numbers: Int64s) -> NDArray[np.intp]:
    """How many bytes each number needs."""
    sizes = np.ones(len(numbers), np.intp)
    limit = _MORE
    while (longer := numbers >= limit).any():
        sizes += longer
        limit <<= _BITS
    return sizes
