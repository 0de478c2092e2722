"""How conversations are cut to segments: runs of at most SEGMENT_TOKENS tokens of one role.

A planted behaviour moves its directions at one place, noise moves them anywhere; so what is looked
at together should be near together, whatever the conversation's length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.records import SEGMENT_TOKENS, Int8s

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where segments lie; arrays as in `Segments`, [S] each.

    Attributes:
      row: which conversation.
      role: whose tokens.
      start: position of the first.
      end: position behind the last.
    """

    row: Int64s
    role: Int8s
    start: Int64s
    end: Int64s

    def __len__(self) -> int:
        return len(self.row)


def cut(roles: Sequence[Int8s]) -> Cut:
    """Cut conversations to segments, given the role of every token of each."""
    tokens = np.array([len(each) for each in roles], np.int64)
    row = np.repeat(np.arange(len(roles)), tokens)
    role = np.concatenate([*roles, np.empty(0, np.int8)])
    position = np.arange(len(row)) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    begins = (position == 0) | np.r_[True, role[1:] != role[:-1]][: len(row)]
    runs = np.flatnonzero(begins)
    into_run = np.arange(len(row)) - np.repeat(runs, np.diff([*runs, len(row)]))
    first = np.flatnonzero(into_run % SEGMENT_TOKENS == 0)
    sizes = np.diff([*first, len(row)])
    return Cut(row[first], role[first], position[first], position[first] + sizes)
