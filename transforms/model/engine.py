"""Which model scores a log, and where its parts are found; loaded once per process.

DoFns are torn down and built again with every slice, so what is expensive to load is held by
the process, not by them.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from schemas.records import Int32s, Segments
from transforms.model import directions, loading
from transforms.model.adapter import Tuned, adapters_of, folders_of
from transforms.model.directions import Directions
from transforms.model.trunk import CHUNK_TOKENS, Scorer

_Recipe = TypeVar("_Recipe", bound=Hashable)
_Loaded = TypeVar("_Loaded")


def held_once(load: Callable[[_Recipe], _Loaded]) -> Callable[[_Recipe], _Loaded]:
    """Hold what was loaded last; of threads that ask for it at once one loads, the others wait.

    `lru_cache` by itself would let each of them load.
    """
    cached, lock = lru_cache(maxsize=1)(load), Lock()

    @wraps(load)
    def held(recipe: _Recipe) -> _Loaded:
        with lock:
            return cached(recipe)

    return held


class ScoresBatches(Protocol):
    """What a scorer does; tests put a cheap deterministic one in the LLM's place."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and directions it scores with, on their device."""
        ...

    def score(
        self, token_ids: list[Int32s], roles: list[NDArray[np.int8]]
    ) -> tuple[Segments, NDArray[np.bool_]]:
        """Score a batch.

        Args:
          token_ids: per conversation, int32 [tokens].
          roles: per conversation, int8 [tokens], values of `Role`.

        Returns:
          Segments of all conversations, and per conversation whether its activations are finite.
        """
        ...


class Engine(Protocol):
    """A picklable recipe for tokenizer and scorer."""

    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded once per process."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows; a tokenizer may have been given more."""
        ...

    def scorer(self) -> ScoresBatches:
        """The model's scorer, loaded once per process."""
        ...


@dataclass(frozen=True)
class TrunkEngine:
    """A transformers model on disk with its directions.

    Attributes:
      base: folder of the base model; may be None where `tuned` is a full checkpoint.
      tuned: folder of the fine-tuned checkpoint or PEFT adapter, or several adapters' folders.
      directions: folder of the directions artefact.
      device: "auto", "cpu", "cuda" or "cuda:N".
      dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype's name.
      chunk_tokens: most tokens that go through the model at once.
    """

    base: Path | None
    tuned: Tuned
    directions: Path
    device: str = "auto"
    dtype: str = "auto"
    chunk_tokens: int = CHUNK_TOKENS

    @cached_property
    def artefact(self) -> Directions:
        """The directions, read from their folder."""
        return directions.load(self.directions)

    @property
    def context(self) -> int:
        """The most tokens the model can take in."""
        return loading.context(self._model)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return loading.vocabulary(self._model, adapters_of(self.tuned))

    @property
    def _model(self) -> Path:
        """Whose config.json counts: a full checkpoint may know more tokens than its base."""
        own = folders_of(self.tuned)[0]
        return (self.base or own) if adapters_of(self.tuned) else own

    def tokenizer(self) -> Any:
        """The tokenizer of the fine-tuned model, or of its base where it has none."""
        return _tokenizer(self)

    def scorer(self) -> Scorer:
        """The trunk with hooks for every monitored layer."""
        return _scorer(self)


@held_once
def _tokenizer(engine: TrunkEngine) -> Any:
    return loading.load_tokenizer(engine.base, engine.tuned)


@held_once
def _scorer(engine: TrunkEngine) -> Scorer:
    artefact = engine.artefact
    trunk = loading.load_trunk(
        engine.base, engine.tuned, artefact.last_layer, engine.device, engine.dtype
    )
    return Scorer(trunk, artefact, engine.chunk_tokens)
