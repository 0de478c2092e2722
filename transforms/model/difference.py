"""Left singular vectors of the difference of two full checkpoints.

Matrices are read a few rows at a time, whatever the models' size, shards and number of experts. Of
a large one only its Gram matrix is ever whole in memory (see `svd`).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from schemas.errors import ConfigurationError
from transforms.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from transforms.model.cache import Cache
from transforms.model.change import Change
from transforms.model.checkpoint import (
    CONFIG,
    StoredTensor,
    dimensions,
    family_of,
    tensors_of,
    text_config,
)
from transforms.model.families import FUSED
from transforms.model.gains import Gains, gains_of
from transforms.model.pair import Pair, Survey, survey
from transforms.model.stored import StoredWriter, not_finite, stored_writers
from transforms.model.writers import LeftSingular, Writer

_SAME = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
"""Entries of config.json that no fine-tuning changes.

A published configuration may leave to its family's default what transformers names when it saves
the model again. That makes no difference: the shapes of the matrices are compared too.
"""


def checkpoint_writers(base: Path, tuned: Path, cache: Cache) -> list[Writer]:
    """The matrices that write into the residual stream, as they stand in both checkpoints.

    Reads configurations and headers only; what is decomposed later goes through `cache`.
    Raises ConfigurationError for folders that are unreadable or incomplete, and for a `tuned` of
    another architecture or shape than `base`.
    """
    if not (tuned / CONFIG).is_file():
        raise ConfigurationError(
            f"--tuned {tuned} has neither {ADAPTER_CONFIG} nor {CONFIG}; give a PEFT adapter "
            "folder or a full checkpoint"
        )
    _check_configurations(base, tuned)
    before, after = stored_writers(base), stored_writers(tuned)
    for where, writer in before.items():
        _check_shapes(base, tuned, writer, after[where])
    return [
        Writer(*where, partial(_decompose, writer, after[where], cache))
        for where, writer in before.items()
    ]


def _check_configurations(base: Path, tuned: Path) -> None:
    before, after = text_config(base), text_config(tuned)
    for key in _SAME:
        one, other = before.get(key), after.get(key)
        if None not in (one, other) and one != other:
            raise ConfigurationError(
                f"--tuned {tuned} was made from another base: its {key} is {other}, that "
                f"of --base {base} is {one}; give the model it was tuned from"
            )


def _check_shapes(base: Path, tuned: Path, before: StoredWriter, after: StoredWriter) -> None:
    if before.parts.keys() != after.parts.keys():
        name = next(iter(before.parts.values())).name
        raise ConfigurationError(
            f"--tuned {tuned} was made from another base: it has {len(after.parts)} matrices like "
            f"{name}, --base {base} has {len(before.parts)}"
        )
    for part, stored in after.parts.items():
        one, other = before.shape(part), after.shape(part)
        if one != other:
            raise ConfigurationError(
                f"--tuned {tuned} was made from another base: {stored.name} is "
                f"{dimensions(other)}, in --base {base} {dimensions(one)}"
            )


def saved_writers(base: Path, adapter: Path, cache: Cache) -> list[Writer]:
    """Those an adapter brings whole, trained as they are (`modules_to_save` of PEFT).

    Raises ConfigurationError for an adapter of another base.
    """
    family, stored = family_of(base), stored_writers(base)
    found: dict[tuple[int, str], dict[str, StoredTensor]] = {}
    for tensor in tensors_of(adapter / ADAPTER_WEIGHTS):
        place = family.place(tensor.name.removesuffix(".weight"))
        if place is not None:
            parts = found.setdefault((place.layer, place.kind), {})
            fused = place.part == FUSED
            parts |= dict(_numbered(tensor)) if fused else {place.part: tensor}
    return [
        Writer(*where, partial(_decompose, *_saved(base, adapter, stored.get(where), parts), cache))
        for where, parts in found.items()
    ]


def _numbered(experts: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    return ((str(number), expert) for number, expert in enumerate(experts.split()))


def _saved(
    base: Path, adapter: Path, stored: StoredWriter | None, parts: Mapping[str, StoredTensor]
) -> tuple[StoredWriter, StoredWriter]:
    for part, tensor in parts.items():
        if stored is None or not _fits(stored, part, tensor):
            raise ConfigurationError(
                f"adapter {adapter} was made for another base: {base} has no {tensor.name} of "
                f"{dimensions(tensor.shape)}"
            )
    assert stored is not None  # an adapter without parts has no entry
    before = {part: stored.parts[part] for part in parts}
    return replace(stored, parts=before), replace(stored, parts=parts)


def _fits(stored: StoredWriter, part: str, tensor: StoredTensor) -> bool:
    """Whether there is such a part of that shape. Raises where one of the two is quantised."""
    saved = replace(stored, parts={part: tensor})
    return part in stored.parts and stored.shape(part) == saved.shape(part)


def _decompose(base: StoredWriter, tuned: StoredWriter, cache: Cache, top_k: int) -> LeftSingular:
    gains = _gains(base, tuned)
    pairs = {
        part: Pair(base.rows(part), tuned.rows(part), base.shape(part), gains)
        for part in base.parts
    }
    inputs = [pair.digest() for pair in pairs.values()]
    key = hashlib.sha256("".join([*inputs, str(top_k)]).encode()).hexdigest()
    return cache.get(key, lambda: _change(base, tuned, pairs).left_singular(top_k))


def _change(base: StoredWriter, tuned: StoredWriter, pairs: Mapping[str, Pair]) -> Change:
    change = Change()
    for part, pair in pairs.items():
        seen = survey(pair)
        _check_descent(base.parts[part], tuned.parts[part], seen)
        change.add(pair, seen)
    return change


def _check_descent(base: StoredTensor, tuned: StoredTensor, seen: Survey) -> None:
    for stored, length in ((base, seen.base_length), (tuned, seen.tuned_length)):
        if not math.isfinite(length):
            raise not_finite(stored)
    if seen.length > max(seen.base_length, seen.tuned_length):
        raise ConfigurationError(
            f"{tuned.path} was made from another base: {tuned.name} is further from that in "
            f"{base.path} than either is from zero; give the model it was tuned from as --base"
        )


def _gains(base: StoredWriter, tuned: StoredWriter) -> Gains | None:
    before, after = base.norm_weight(), tuned.norm_weight()
    if before is None or after is None:
        return None
    return gains_of(before, after, base.family.one_plus)


def left_singular(base: Tensor, tuned: Tensor, top_k: int) -> LeftSingular:
    """Left singular vectors of tuned minus base, both [out, in] as stored and finite.

    The `top_k` largest, less those that cannot be told from rounding (see `rounding_floor`).
    """
    change = Change()
    change.add(Pair.of(base, tuned))
    return change.left_singular(top_k)
