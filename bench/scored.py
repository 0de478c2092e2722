"""Scores that are made once and kept in files, so that policies can be tried on them in seconds."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from schemas.records import Segments
from transforms.model.batching import batches, default_tokens
from transforms.model.engine import TrunkEngine
from transforms.model.loading import placement
from transforms.model.roles import Tokens
from transforms.tokenize import MAX_BATCH_ROWS


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
