"""Ranges: everything that is known about normal traffic of one model.

Ranges form a commutative monoid: `emptied` is its unit, `merged` its operation, both exact. So an
epoch can be counted in any order, on any number of machines, and closed by one merge.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from schemas.artefacts import canonical_json
from schemas.errors import ConfigurationError
from schemas.records import Int32s, Role
from transforms.ranges.counts import Counts
from transforms.ranges.scores import ScoreCounts
from transforms.ranges.series import Stretches

FORMAT: Final = 4
"""1 and 2 knew whole conversations only; 3 held histograms as the rows of a sparse matrix. Their
scores are of `budget/1` and `budget/2`."""

SPREAD: Final = 8
"""Segments of a role that count of one conversation: else a few long ones would outweigh all."""

_METADATA_KEY: Final = "deltawatch"
_SEGMENTS, _CONVERSATIONS, _ACCEPTED = "segments.", "conversations.", "accepted."
_VERDICTS = "verdicts"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Ranges:
    """Counts of series and of scores under one set of directions. Immutable.

    Attributes:
      directions_hash: of the directions artefact the series belong to.
      model: name of the monitored model.
      segments: values of segments in every series, at most SPREAD of a role and conversation.
      conversations: values of whole conversations in every series.
      scores: what `budget` said of conversations before they were counted.
      judged: how many conversations were flagged or found clean while these were counted.
      flagged: of these; they are counted in nothing but the scores.
      accepted: ranges of conversations that a person called normal; normal is what is within
        either. They have no scores: thresholds stay. None: there are none.
    """

    directions_hash: str
    model: str
    segments: Counts
    conversations: Counts
    scores: ScoreCounts
    judged: int = 0
    flagged: int = 0
    accepted: "Ranges | None" = None

    @staticmethod
    def empty(directions: int, directions_hash: str, model: str) -> "Ranges":
        """Ranges of no traffic, for a number of directions."""
        nothing = Counts.empty(directions)
        return Ranges(directions_hash, model, nothing, nothing, ScoreCounts.empty())

    def emptied(self) -> "Ranges":
        """Ranges of no traffic, under the same directions and model."""
        return Ranges.empty(self.segments.directions, self.directions_hash, self.model)

    def plus(self, segments: Stretches) -> "Ranges":
        """With the values of conversations counted, given by segments."""
        return replace(
            self,
            segments=self.segments.plus(segments.spread(SPREAD)),
            conversations=self.conversations.plus(segments.whole()),
        )

    def plus_scores(
        self,
        scores: Int32s,
        lengths: NDArray[np.int64],
        absent: NDArray[np.bool_],
        held: Int32s | None = None,
    ) -> "Ranges":
        """With scores counted; see `ScoreCounts.plus`."""
        return replace(self, scores=self.scores.plus(scores, lengths, absent, held))

    def plus_verdicts(self, judged: int, flagged: int) -> "Ranges":
        """With so many conversations judged, and so many of them flagged."""
        return replace(self, judged=self.judged + judged, flagged=self.flagged + flagged)

    def merged(self, other: "Ranges") -> "Ranges":
        """The ranges of both.

        Raises:
          ConfigurationError: they belong to other directions or to another model.
        """
        if (self.directions_hash, self.model) != (other.directions_hash, other.model):
            raise ConfigurationError(
                f"ranges of {other.model!r} (directions {other.directions_hash[:12]}) cannot be"
                f" added to ranges of {self.model!r} (directions {self.directions_hash[:12]});"
                f" calibrate anew or name the model they were made for"
            )
        return Ranges(
            self.directions_hash,
            self.model,
            self.segments.merged(other.segments),
            self.conversations.merged(other.conversations),
            self.scores.merged(other.scores),
            self.judged + other.judged,
            self.flagged + other.flagged,
            _either(self.accepted, other.accepted),
        )

    def accepting(self, group: "Ranges") -> "Ranges":
        """With conversations accepted, given by ranges of their own. Raises like `merged`."""
        return self.merged(replace(self.emptied(), accepted=group))

    @property
    def is_empty(self) -> bool:
        """Whether they are of no traffic."""
        return not (self.conversations.total or self.judged or self.accepted)

    @property
    def without_segments(self) -> int:
        """Conversations that a former version counted, which knew no segments."""
        return self.conversations.total - self.segments.total

    def behind_segments(self, role: Role) -> int:
        """How many conversations of a role the counts of segments are of, at least."""
        return max(int(self.conversations.stretches[role]) - self.without_segments, 0)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content: equal exactly where all counts, directions and model are."""
        digest = hashlib.sha256(self._identity())
        for name, array in sorted(self._arrays().items()):
            digest.update(canonical_json([name, array.dtype.str, array.shape]))
            digest.update(array.tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """As a safetensors file; the same content gives the same bytes."""
        # One metadata entry only: safetensors does not keep several of them in a fixed order.
        return save(self._arrays(), {_METADATA_KEY: self._identity().decode("ascii")})

    @staticmethod
    def from_bytes(data: bytes, expected: str | None = None) -> "Ranges":
        """Read back what `to_bytes` gave. Raises ValueError, in one line, for anything else.

        So it does for what has another hash than `expected`; of former formats none is known.
        """
        try:
            arrays = load(data)
            identity = _metadata(data)
            if identity["format"] not in _READERS:
                raise ValueError(f"format {identity['format']}, newer than {FORMAT}")
            read = _READERS[identity["format"]]
            ranges = read(identity["directions_hash"], identity["model"], arrays)
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file ({error})") from None
        except KeyError as error:
            raise ValueError(f"not ranges: {error} is missing") from None
        if identity["format"] == FORMAT and expected not in (None, ranges.hash):
            raise ValueError("its content has another hash than its name")
        return ranges

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled between Beam's workers, where dense histograms would be ten times the size.
        return Ranges.from_bytes, (self.to_bytes(),)

    def _identity(self) -> bytes:
        return canonical_json(
            {"format": FORMAT, "directions_hash": self.directions_hash, "model": self.model}
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = self.scores.to_arrays()
        arrays[_VERDICTS] = np.array([self.judged, self.flagged], np.int64)
        for prefix, counts in ((_SEGMENTS, self.segments), (_CONVERSATIONS, self.conversations)):
            arrays |= {prefix + name: array for name, array in counts.to_arrays().items()}
        if self.accepted is not None:
            accepted = self.accepted._arrays()
            arrays |= {_ACCEPTED + name: array for name, array in accepted.items()}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def close(ranges: Ranges, open_counts: Ranges) -> Ranges:
    """Ranges after an epoch has ended: those before it, with what was counted in it.

    Raises:
      ConfigurationError: they belong to other directions or to another model.
    """
    return ranges.merged(open_counts)


def _either(mine: Ranges | None, other: Ranges | None) -> Ranges | None:
    if mine is None or other is None:
        return mine or other
    return mine.merged(other)


def _of_arrays(directions_hash: str, model: str, arrays: Arrays) -> Ranges:
    accepted = _below(_ACCEPTED, arrays)
    judged, flagged = arrays[_VERDICTS].tolist()
    return Ranges(
        directions_hash,
        model,
        Counts.from_arrays(_below(_SEGMENTS, arrays)),
        Counts.from_arrays(_below(_CONVERSATIONS, arrays)),
        ScoreCounts.from_arrays(arrays),
        judged,
        flagged,
        _of_arrays(directions_hash, model, accepted) if accepted else None,
    )


def _below(prefix: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _of_rows(directions_hash: str, model: str, arrays: Arrays) -> Ranges:
    """What format 3 holds: `Counts` knows its rows; its scores are of no use any more."""
    segments, conversations = (
        Counts.from_arrays(_below(prefix, arrays)) for prefix in (_SEGMENTS, _CONVERSATIONS)
    )
    return Ranges(directions_hash, model, segments, conversations, ScoreCounts.empty())


def _of_arrays_before(directions_hash: str, model: str, arrays: Arrays) -> Ranges:
    """What formats 1 and 2 hold: no segments, and scores that are of no use any more."""
    stretches = arrays["conversations"]
    # Format 1 did not count all; hardly a conversation lacks the more frequent role.
    total = arrays.get("total", stretches.max(keepdims=True))
    counts = Counts.from_arrays({**arrays, "stretches": stretches, "total": total})
    return Ranges(
        directions_hash, model, Counts.empty(counts.directions), counts, ScoreCounts.empty()
    )


_READERS: Final = {1: _of_arrays_before, 2: _of_arrays_before, 3: _of_rows, FORMAT: _of_arrays}


def _metadata(data: bytes) -> dict[str, Any]:
    """What `to_bytes` put into the header, which starts with its length in 8 bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata: dict[str, Any] = json.loads(header["__metadata__"][_METADATA_KEY])
    return metadata
