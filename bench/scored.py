"""Scores that are made once and kept in files, so that policies can be tried on them in seconds."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np

from schemas.records import Message, Segments
from transforms.model.batching import batches, default_tokens
from transforms.model.engine import TrunkEngine
from transforms.model.loading import placement
from transforms.model.roles import TemplateError, Tokens, tokenize
from transforms.tokenize import MAX_BATCH_ROWS

PART_TOKENS: Final = 48_000
"""Most tokens in a file: what a run that is killed may lose."""


@dataclass(frozen=True)
class Scores:
    """What an organism's directions see of conversations.

    Attributes:
      engine: the organism with its directions.
      folder: of the files. Their names hold a hash of what was scored and by which directions.
    """

    engine: TrunkEngine
    folder: Path

    def of(self, name: str, talks: Sequence[Sequence[Message]], max_tokens: int) -> Segments:
        """The segments of conversations, in their order, each cut to so many tokens.

        Raises TemplateError where the model's template refuses one.
        """
        if not talks:
            return Segments.none(0, len(self.engine.artefact))
        rows = [_whole(row) for row in tokenize(self.engine.tokenizer(), list(talks), max_tokens)]
        size = max(PART_TOKENS // max_tokens, 1)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return Segments.joined([self._part(name, part) for part in parts])

    def _part(self, name: str, rows: Sequence[Tokens]) -> Segments:
        digest = hashlib.sha256(self.engine.artefact.hash.encode())
        for row in rows:
            digest.update(len(row.ids).to_bytes(4, "big") + row.ids.tobytes() + row.roles.tobytes())
        file = self.folder / f"{name}-{digest.hexdigest()[:16]}.npz"
        return kept(file, lambda: score(self.engine, rows))


def kept(file: Path, make: Callable[[], Segments]) -> Segments:
    """What is in the file, which is made where there is none."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = make()
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, **{each.name: getattr(made, each.name) for each in fields(made)})
        partial.rename(file)
    with np.load(file) as found:
        conversations = int(found["conversations"])
        arrays = {name: found[name] for name in found.files if name != "conversations"}
    return Segments(conversations=conversations, **arrays)


def score(engine: TrunkEngine, rows: Sequence[Tokens]) -> Segments:
    """The segments of conversations, in their order; all have to be finite."""
    device, _ = placement(engine.device, engine.dtype)
    tokens = [len(row.ids) for row in rows]
    order, parts = [], []
    for batch in batches(tokens, default_tokens(device), MAX_BATCH_ROWS):
        chosen = [rows[index] for index in batch]
        segments, finite = engine.scorer().score(
            [row.ids for row in chosen], [row.roles for row in chosen]
        )
        assert finite.all()
        order += batch
        parts.append(segments)
    return Segments.joined(parts).take(np.argsort(order))


def _whole(row: Tokens | TemplateError) -> Tokens:
    if isinstance(row, TemplateError):
        raise row
    return row
