"""What a checkpoint on disk writes into the residual stream with, by the names of its tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from schemas.errors import ConfigurationError
from transforms.model.checkpoint import (
    StoredTensor,
    dimensions,
    family_of,
    layer_count,
    stored_tensors,
)
from transforms.model.families import FUSED, KINDS, Family
from transforms.model.gains import Rows

_DTYPES = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class StoredWriter:
    """What one kind writes with in one layer. Nothing is read before it is asked for."""

    family: Family
    parts: Mapping[str, StoredTensor]  # ONLY, or experts by their number and SHARED
    norm: StoredTensor | None  # weight of the norm between it and the residual stream

    def rows(self, part: str) -> Rows:
        """What reads rows of a part [out, in]. Raises ConfigurationError where it is quantised."""
        stored = self.parts[part]
        _check_plain(stored, dimensionality=2)
        if self.family.conv1d:
            return lambda start, end: stored.columns(start, end).T
        return stored.rows

    def shape(self, part: str) -> tuple[int, int]:
        """(out, in) of a part. Raises ConfigurationError where it is quantised."""
        _check_plain(self.parts[part], dimensionality=2)
        first, last = self.parts[part].shape
        return (last, first) if self.family.conv1d else (first, last)

    def gain(self) -> Tensor | None:
        """What the norm in between multiplies by, [out] float64; None where there is no norm.

        Raises ConfigurationError when it cannot be read, or has NaN or infinity.
        """
        weight = self.norm_weight()
        return None if weight is None else weight.double() + self.family.one_plus

    def norm_weight(self) -> Tensor | None:
        """The weight of the norm in between, [out], as stored. Raises as `gain` does."""
        return None if self.norm is None else _read(self.norm)


def _read(stored: StoredTensor) -> Tensor:
    _check_plain(stored, dimensionality=1)
    tensor = stored.rows(0, stored.shape[0])
    if not bool(torch.isfinite(tensor).all()):
        raise not_finite(stored)
    return tensor


def not_finite(stored: StoredTensor) -> ConfigurationError:
    """What to raise for a weight that is NaN or infinite."""
    return ConfigurationError(f"NaN or Inf in {stored.name} of {stored.path}; save it again")


def _check_plain(stored: StoredTensor, dimensionality: int) -> None:
    if stored.dtype not in _DTYPES or len(stored.shape) != dimensionality:
        raise ConfigurationError(
            f"{stored.name} in {stored.path} is {stored.dtype} {dimensions(stored.shape)}, "
            "not a plain matrix; give the checkpoint before it was quantised"
        )


def stored_writers(folder: Path) -> dict[tuple[int, str], StoredWriter]:
    """Everything that writes, by layer and kind, in stored order. Reads headers only.

    Raises ConfigurationError where a layer lacks one, and for a family that is not known.
    """
    family = family_of(folder)
    found = _in_layers(folder, family)
    return {
        (layer, kind): _writer(folder, family, found.get(layer, {}), (layer, kind))
        for layer in range(layer_count(folder))
        for kind in KINDS
    }


def _in_layers(folder: Path, family: Family) -> dict[int, dict[str, StoredTensor]]:
    """What writes and the norms behind it: by layer, and path within the layer."""
    norms = {family.source(kind).norm for kind in KINDS}
    found: dict[int, dict[str, StoredTensor]] = {}
    for name, tensor in stored_tensors(folder).items():
        layer, path = family.split(name.removesuffix(".weight"))
        if layer is None or (family.part(path) is None and path not in norms):
            continue
        earlier = found.setdefault(layer, {}).setdefault(path, tensor)
        if earlier is not tensor:
            raise ConfigurationError(
                f"{folder} has both {earlier.name} and {name}; save the language model alone"
            )
    return found


def _writer(
    folder: Path, family: Family, stored: Mapping[str, StoredTensor], where: tuple[int, str]
) -> StoredWriter:
    layer, kind = where
    source = family.source(kind)
    parts = dict(sorted(_parts(family, kind, stored), key=lambda item: (len(item[0]), item[0])))
    lacking = source if not parts else source.norm if source.norm not in {None, *stored} else None
    if lacking is not None:
        raise ConfigurationError(
            f"{folder} has no {lacking}.weight of layer {layer}; give the whole checkpoint, not "
            "quantised and with the names of its family"
        )
    return StoredWriter(family, parts, stored[source.norm] if source.norm else None)


def _parts(
    family: Family, kind: str, stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """A kind's parts; what is fused counts as experts apart."""
    for path, tensor in stored.items():
        found = family.part(path)
        if found is None or found[0] != kind:
            continue
        if found[1] == FUSED:
            yield from ((str(expert), part) for expert, part in enumerate(tensor.split()))
        else:
            yield found[1], tensor
