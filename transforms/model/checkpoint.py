"""What can be known of a model folder (Hugging Face layout) without loading the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from schemas.artefacts import read_json, readable
from schemas.errors import ConfigurationError
from transforms.model.families import FAMILIES, Family

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; ConfigurationError names `what` when there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {what} {path}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{what} {path} is not a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that must stay on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_folder(folder: Path, option: str) -> None:
    """Raise ConfigurationError unless `folder` (given by `option`) is a folder."""
    if not folder.is_dir():
        raise ConfigurationError(f"{option} {folder} is not a folder; give the model's folder")


def model_files(folder: Path) -> list[Path]:
    """config.json, safetensors weights (with their index where there is one), tokenizer.

    Raises ConfigurationError when the folder lacks one of them or it cannot be read; other formats
    (.bin, .gguf) are not read, because loading them may run code or loses the hashes.
    """
    weights = _weight_files(folder)
    config = folder / CONFIG
    if not config.is_file():
        raise ConfigurationError(f"{folder} has no {CONFIG}; give a folder in Hugging Face layout")
    return readable([config, *weights, *tokenizer_files(folder)])


def tokenizer_files(folder: Path) -> list[Path]:
    """What decides how a conversation becomes tokens, as far as the folder has it.

    Hashed with the weights: ranges made with one chat template say nothing about another's.
    """
    names = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    return [folder / name for name in names if (folder / name).is_file()]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise ConfigurationError(f"{folder} has no {_SINGLE}; save the model as safetensors there")
    shards = sorted(_shards(folder / _INDEX))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ConfigurationError(f"{folder} lacks weight file {missing[0]}; complete the download")
    return [folder / _INDEX, *(folder / name for name in shards)]


def _shards(index: Path) -> set[str]:
    weights = read_object(index, "weight index").get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(each, str) for each in weights.values()):
        raise ConfigurationError(f"{index} names no weight files; complete the download")
    return set(weights.values())


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One weight in a file, or a part of one, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "F32", "BF16", "I8"
    index: int | None = None  # place in the first dimension of the weight; None: all of it

    def rows(self, start: int, end: int) -> Tensor:
        """Rows of the weight, as stored. Raises ConfigurationError when it cannot be read.

        The file is mapped anew every time: what stays mapped stays in memory.
        """
        with _opened(self.path) as file:
            part = file.get_slice(self.name)
            rows = slice(start, end)
            tensor: Tensor = part[rows] if self.index is None else part[self.index, rows]
        return tensor

    def columns(self, start: int, end: int) -> Tensor:
        """Columns of a matrix, likewise."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_slice(self.name)[:, start:end]
        return tensor

    def split(self) -> list["StoredTensor"]:
        """Its parts along the first dimension."""
        return [replace(self, shape=self.shape[1:], index=index) for index in range(self.shape[0])]


def dimensions(shape: tuple[int, ...]) -> str:
    """A shape as a person writes it: "576x1536"."""
    return "x".join(map(str, shape))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every weight by name, from the headers of all shards; no weight is read.

    Raises ConfigurationError when a file is missing or unreadable.
    """
    return {
        tensor.name: tensor
        for path in readable(_weight_files(folder))
        if path.suffix == ".safetensors"
        for tensor in tensors_of(path)
    }


def tensors_of(path: Path) -> list[StoredTensor]:
    """Every weight of one file, likewise."""
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return [
            StoredTensor(path, key, tuple(part.get_shape()), part.get_dtype())
            for key, part in slices.items()
        ]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"cannot read weights {path}: {first_line(error)}") from error


def text_config(folder: Path) -> dict[str, Any]:
    """config.json, or the part of it about the language model where it has several parts.

    With the usual names of entries, whatever the family calls them.
    """
    whole = read_object(folder / CONFIG, "model configuration")
    config = dict(whole.get("text_config", whole))
    known = FAMILIES.get(config.get("model_type", ""))
    names = known.config_names if known else {}
    return {names.get(key, key): value for key, value in config.items()}


def layer_count(folder: Path) -> int:
    """How many decoder layers the model in `folder` has, by its config.json."""
    layers = text_config(folder).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ConfigurationError(f"{folder / CONFIG} names no num_hidden_layers; save it again")
    return layers


def family_of(folder: Path) -> Family:
    """The family of the model in `folder`.

    Raises ConfigurationError for one that is not known, and for a language model of a known family
    inside a model that transformers does not load as one: it could not be watched.
    """
    name = str(text_config(folder).get("model_type"))
    if name not in FAMILIES:
        raise ConfigurationError(
            f"{folder} is of model family {name!r}, which is not known; add a row for it to "
            "FAMILIES in transforms/model/families.py, as docs/architectures.md says; known are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    outer = str(read_object(folder / CONFIG, "model configuration").get("model_type", name))
    if outer != name and outer not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigurationError(
            f"{folder} is of model type {outer!r}, in which the language model ({name!r}) is not "
            "found; save the language model alone"
        )
    return FAMILIES[name]
