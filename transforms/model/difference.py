"""Left singular vectors of the difference of two full checkpoints.

One matrix of each model is in memory at a time, whatever the models' size, shards and number of
experts. The decomposition is exact, LAPACK in float64 on the CPU.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from schemas.errors import ConfigurationError
from transforms.model.adapter import ADAPTER_CONFIG
from transforms.model.change import Change
from transforms.model.checkpoint import CONFIG, dimensions, text_config
from transforms.model.gains import Gains, gains_of
from transforms.model.stored import StoredWriter, stored_writers
from transforms.model.writers import LeftSingular, Writer

_SAME = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
"""Entries of config.json that no fine-tuning changes."""


def checkpoint_writers(base: Path, tuned: Path) -> list[Writer]:
    """The matrices that write into the residual stream, as they stand in both checkpoints.

    Reads configurations and headers only. Raises ConfigurationError for folders that are
    unreadable or incomplete, and for a `tuned` of another architecture or shape than `base`.
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
        Writer(*where, partial(_decompose, writer, after[where]))
        for where, writer in before.items()
    ]


def _check_configurations(base: Path, tuned: Path) -> None:
    before, after = text_config(base), text_config(tuned)
    for key in _SAME:
        if before.get(key) != after.get(key):
            raise ConfigurationError(
                f"--tuned {tuned} was made from another base: its {key} is {after.get(key)}, that "
                f"of --base {base} is {before.get(key)}; give the model it was tuned from"
            )


def _check_shapes(base: Path, tuned: Path, before: StoredWriter, after: StoredWriter) -> None:
    if before.parts.keys() != after.parts.keys():
        name = next(iter(before.parts.values())).name
        raise ConfigurationError(
            f"--tuned {tuned} was made from another base: it has {len(after.parts)} matrices like "
            f"{name}, --base {base} has {len(before.parts)}"
        )
    for part, one in before.parts.items():
        other = after.parts[part]
        if one.shape != other.shape:
            raise ConfigurationError(
                f"--tuned {tuned} was made from another base: {other.name} is "
                f"{dimensions(other.shape)}, in --base {base} {dimensions(one.shape)}"
            )


def _decompose(base: StoredWriter, tuned: StoredWriter, top_k: int) -> LeftSingular:
    change = Change(_gains(base, tuned))
    for part in base.parts:
        change.add(*_matrices(base, tuned, part))
    return change.left_singular(top_k)


def _matrices(base: StoredWriter, tuned: StoredWriter, part: str) -> tuple[Tensor, Tensor]:
    before, after = base.matrix(part), tuned.matrix(part)
    if _length(after.double().sub_(before)) > max(_length(before), _length(after)):
        one, other = base.parts[part], tuned.parts[part]
        raise ConfigurationError(
            f"{other.path} was made from another base: {other.name} is further from that in "
            f"{one.path} than either is from zero; give the model it was tuned from as --base"
        )
    return before, after


def _length(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


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
    change.add(base, tuned)
    return change.left_singular(top_k)
