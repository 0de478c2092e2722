"""A scorer without a model, for tests of everything around it."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.records import Int32s, Segments

_SPREAD = 0.04  # standard deviation of a cosine, as of the real model's directions
_BYTES_PER_NUMBER = 8


class CheapScorer:
    """Gives every segment of a conversation the cosines a hash of its tokens says.

    The same tokens get the same integers in every batch, process and run.
    """

    def __init__(self, directions: int, seed: int = 0) -> None:
        """Score against `directions` directions; another `seed` is another model."""
        self._directions = directions
        self._seed = seed

    @property
    def nbytes(self) -> int:
        """It has no weights."""
        return 0

    def score(
        self, token_ids: Sequence[Int32s], roles: Sequence[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Score like `transforms.model.trunk.Scorer`, which see for shapes; all are finite."""
        found = [
            (row, int(whose[start]), start, end - start, ids[start:end])
            for row, (ids, whose) in enumerate(zip(token_ids, roles, strict=True))
            for start, end in segments_of(whose.tolist())
        ]
        rows, of_role, starts, tokens = (
            np.array([each[part] for each in found], np.int64) for part in range(4)
        )
        steps, places = self._extremes([(role, ids) for _, role, _, _, ids in found])
        segments = Segments(
            len(token_ids),
            rows.astype(np.int32),
            of_role.astype(np.int8),
            starts.astype(np.uint32),
            tokens.astype(np.uint8),
            steps[:, 0],
            steps[:, 1],
            places[:, 0],
            places[:, 1],
        )
        return segments, np.ones(len(token_ids), np.bool_)

    def _extremes(
        self, found: Sequence[tuple[int, Int32s]]
    ) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Of segments' roles and tokens: steps and places [S, 2, directions], lowest first."""
        words = [self._words(ids, role) for role, ids in found]
        hashed = np.array(words).reshape(len(found), 4, self._directions, 4)
        steps = np.sort(_bell(hashed[:, :2]), axis=1).astype(np.int16)
        tokens = np.array([len(ids) for _, ids in found], np.int64)[:, None, None]
        return steps, (hashed[:, 2:, :, 0] % tokens).astype(np.uint8)

    def _words(self, ids: Int32s, role: int) -> NDArray[np.uint16]:
        """Uint16 [4, directions, 4], uniform, from a hash that any length can be read from."""
        key = np.array([self._seed, role], "<i8").tobytes() + ids.astype("<i4").tobytes()
        digest = hashlib.shake_128(key).digest(4 * self._directions * _BYTES_PER_NUMBER)
        return np.frombuffer(digest, "<u2").reshape(4, self._directions, 4)


def segments_of(roles: Sequence[int]) -> list[tuple[int, int]]:
    """Where segments begin and end, found one token after the other."""
    found: list[tuple[int, int]] = []
    for place, role in enumerate(roles):
        if found and roles[place - 1] == role and place - found[-1][0] < 64:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def _bell(words: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Steps with a bell's shape: the sum of four uniform numbers, standard deviation _SPREAD."""
    uniform = words.astype(np.int64) - 2**15
    # A sum of four has the standard deviation of one (2^16 / sqrt(12)) times 2.
    steps: NDArray[np.float64] = uniform.sum(axis=-1) * (_SPREAD * 32767 / (2**17 / 12**0.5))
    return steps.round().astype(np.int64)
