"""Several fine-tuned models that are adapters over one base, whose weights are in memory once.

The adapters stay beside the base (unmerged LoRA) and each batch names those it goes through.
Merging one into the base for its batches and taking it out again would not give back the base's
last bits, so scores would depend on what was scored before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer

from schemas.records import Int32s, Segments
from transforms.model import directions, loading
from transforms.model.engine import held_once
from transforms.model.trunk import CHUNK_TOKENS, Scorer


@dataclass(frozen=True)
class Adapters:
    """A base and the models over it: what to load.

    Attributes:
      base: folder of the base model.
      tuned: per model its adapters' folders, in the order they were trained.
      directions: per model the folder of its directions artefact.
      device: as `load_trunk` has it.
      dtype: likewise.
      chunk_tokens: most tokens that go through the model at once.
    """

    base: Path
    tuned: tuple[tuple[Path, ...], ...]
    directions: tuple[Path, ...]
    device: str = "auto"
    dtype: str = "auto"
    chunk_tokens: int = CHUNK_TOKENS


@dataclass(frozen=True)
class AdapterEngine:
    """The engine of one of them.

    Attributes:
      shared: all of them.
      which: the place of this one.
    """

    shared: Adapters
    which: int

    @property
    def context(self) -> int:
        """The most tokens the model can take in."""
        return loading.context(self.shared.base)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return loading.vocabulary(self.shared.base)

    def tokenizer(self) -> Any:
        """The tokenizer of the newest of its adapters that has one, or of the base."""
        tuned = self.shared.tuned[self.which]
        return _tokenizer(loading.tokenizer_folder(self.shared.base, tuned))

    def scorer(self) -> "AdapterScorer":
        """The shared trunk, with this model's adapters and directions."""
        return _scorers(self.shared)[self.which]


class Switch:
    """Which adapters of a trunk are active; held by one batch at a time."""

    def __init__(self, trunk: Any) -> None:
        """Take a trunk as made by `load_shared_trunk`."""
        self._layers = [each for each in trunk.modules() if isinstance(each, BaseTunerLayer)]
        self._active: list[str] | None = None
        self._lock = Lock()

    @contextmanager
    def on(self, names: Sequence[str]) -> Iterator[None]:
        """Have exactly these adapters active."""
        with self._lock:
            if self._active != list(names):
                self._active = None  # until all layers agree
                for layer in self._layers:
                    layer.set_adapter(list(names), inference_mode=True)
                self._active = list(names)
            yield


class AdapterScorer:
    """Scores with one model's adapters and directions on a trunk that others share."""

    def __init__(self, scorer: Scorer, switch: Switch, names: Sequence[str]) -> None:
        """Take a scorer on the trunk, the trunk's switch, and the names of the adapters."""
        self._scorer = scorer
        self._switch = switch
        self._names = names

    @property
    def nbytes(self) -> int:
        """Bytes of the shared base with all its adapters, and of this model's directions."""
        return self._scorer.nbytes

    def score(
        self, token_ids: Sequence[Int32s], roles: Sequence[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Score one batch, like `Scorer.score`."""
        with self._switch.on(self._names):
            return self._scorer.score(token_ids, roles)


@cache
def _tokenizer(folder: Path) -> Any:
    return loading.read_tokenizer(folder)


@held_once
def _scorers(shared: Adapters) -> tuple[AdapterScorer, ...]:
    artefacts = [directions.load(folder) for folder in shared.directions]
    last = max(artefact.last_layer for artefact in artefacts)
    trunk, names = loading.load_shared_trunk(
        shared.base, shared.tuned, last, shared.device, shared.dtype
    )
    switch = Switch(trunk)
    return tuple(
        AdapterScorer(Scorer(trunk, artefact, shared.chunk_tokens), switch, own)
        for artefact, own in zip(artefacts, names, strict=True)
    )
