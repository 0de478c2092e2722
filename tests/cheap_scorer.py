"""A scorer without a model, for tests of everything around it."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.records import ABSENT, Cosines, Int32s, Role

_SPREAD = 0.04  # standard deviation of a cosine, as of the real model's directions
_BYTES_PER_NUMBER = 8


class CheapScorer:
    """Gives every conversation the cosines a hash of its tokens says.

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
    ) -> tuple[Cosines, NDArray[np.bool_]]:
        """Score like `transforms.model.trunk.Scorer`, which see for shapes; all are finite."""
        rows = [self._row(ids, whose) for ids, whose in zip(token_ids, roles, strict=True)]
        shape = (len(rows), len(Role) * self._directions)
        low, high, low_at, high_at = (
            np.array([row[part] for row in rows]).reshape(shape) for part in range(4)
        )
        cosines = Cosines(
            low.astype(np.int16),
            high.astype(np.int16),
            low_at.astype(np.uint32),
            high_at.astype(np.uint32),
        )
        return cosines, np.ones(len(rows), np.bool_)

    def _row(self, ids: Int32s, roles: NDArray[np.int8]) -> NDArray[np.int64]:
        """Int64 [4, roles * directions]: low, high and their places."""
        parts = [self._part(ids, np.flatnonzero(roles == role), role) for role in Role]
        return np.concatenate(parts, axis=1)

    def _part(self, ids: Int32s, places: NDArray[np.intp], role: Role) -> NDArray[np.int64]:
        if len(places) == 0:
            return np.repeat([[ABSENT], [ABSENT], [0], [0]], self._directions, axis=1)
        words = self._words(ids, role)
        steps = np.sort(_bell(words[:2]), axis=0)
        return np.concatenate([steps, places[words[2:, :, 0] % len(places)]])

    def _words(self, ids: Int32s, role: Role) -> NDArray[np.uint16]:
        """Uint16 [4, directions, 4], uniform, from a hash that any length can be read from."""
        key = np.array([self._seed, role], "<i8").tobytes() + ids.astype("<i4").tobytes()
        digest = hashlib.shake_128(key).digest(4 * self._directions * _BYTES_PER_NUMBER)
        return np.frombuffer(digest, "<u2").reshape(4, self._directions, 4)


def _bell(words: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Steps with a bell's shape: the sum of four uniform numbers, standard deviation _SPREAD."""
    uniform = words.astype(np.int64) - 2**15
    # A sum of four has the standard deviation of one (2^16 / sqrt(12)) times 2.
    steps: NDArray[np.float64] = uniform.sum(axis=-1) * (_SPREAD * 32767 / (2**17 / 12**0.5))
    return steps.round().astype(np.int64)
