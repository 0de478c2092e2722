"""Loads the part of a model that is monitored: its decoder layers up to the last monitored one.

Nothing is fetched and no code of the model's is run: local safetensors files only.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schemas.errors import ConfigurationError
from transforms.model.adapter import adapter_files, is_adapter
from transforms.model.checkpoint import first_line, require_folder
from transforms.model.families import FAMILIES

_LOCAL = {"trust_remote_code": False, "local_files_only": True}
_TOKENIZER_CONFIG = "tokenizer_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_trunk(
    base: Path | None, tuned: Path, last_layer: int, device: str = "auto", dtype: str = "auto"
) -> nn.Module:
    """Load the trunk of the tuned model, ready for `Scorer`.

    Embedding and decoder layers 0..last_layer in eval mode; no final norm, no lm_head, so the
    output [batch, tokens, hidden] is the residual stream after `last_layer`.

    Args:
      base: folder of the base model; may be None where `tuned` is a full checkpoint.
      tuned: PEFT adapter folder (merged into the base in float32, then cast) or full checkpoint.
      last_layer: last layer kept, counted from 0.
      device: "auto" (CUDA where there is one, else CPU) or a torch device.
      dtype: "auto" (bfloat16 on CUDA, else float32), "float32", "bfloat16" or "float16".

    Raises:
      ConfigurationError: a folder cannot be loaded, or device, dtype or model family will not do.
    """
    place, kind = placement(device, dtype)
    require_folder(tuned, "--tuned")
    model = _merged(base, tuned) if is_adapter(tuned) else _from_folder(tuned, kind)
    return _cut(model, last_layer).to(device=place, dtype=kind).eval().requires_grad_(False)


def load_tokenizer(base: Path | None, tuned: Path) -> Any:
    """Load the tokenizer of the tuned model, or of its base where the adapter has none.

    Raises ConfigurationError where it has no chat template or cannot tell offsets.
    """
    folder = tuned if (tuned / _TOKENIZER_CONFIG).is_file() or base is None else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load tokenizer {folder}: {first_line(error)}") from error
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"the tokenizer of {folder} has no chat template; put the chat_template.jinja "
            f"the model was tuned with into that folder"
        )
    if not tokenizer.is_fast:
        raise ConfigurationError(f"tokenizer {folder} has no offsets; add its tokenizer.json")
    return tokenizer


def context(folder: Path) -> int:
    """The most tokens the model in `folder` can take in, where need be by its family's default.

    Raises ConfigurationError where its config.json cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load model {folder}: {first_line(error)}") from error
    return int(config.get_text_config().max_position_embeddings)


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `--device` and `--dtype` mean on this machine (see `load_trunk`).

    Raises ConfigurationError where there is no such device or type.
    """
    place = _device(device)
    return place, _dtype(dtype, place)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"unknown --device {name}; use auto, cpu or cuda") from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigurationError(f"--device {name}, but torch finds {found} CUDA devices; use cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigurationError(f"unknown --dtype {name}; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _merged(base: Path | None, tuned: Path) -> PreTrainedModel:
    adapter_files(tuned)  # safetensors only: PEFT would unpickle an adapter_model.bin
    if base is None:
        raise ConfigurationError(f"--tuned {tuned} is an adapter; name its model by --base")
    require_folder(base, "--base")
    model = _from_folder(base, torch.float32)
    try:
        adapted = PeftModel.from_pretrained(model, str(tuned), local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"cannot load adapter {tuned}: {first_line(error)}") from error
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def _from_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **_LOCAL}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"cannot load model {folder}: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    missing = loaded[1]["missing_keys"]
    # What the files lack has been made up at random. The head is not used here.
    trunk = f"{model.base_model_prefix}."
    lacking = sorted(key for key in missing if key.startswith(trunk))
    if lacking:
        raise ConfigurationError(f"{folder} lacks {lacking[0]}; give the whole checkpoint")
    return model


def decoder_layers(trunk: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model's trunk, by its family."""
    config: Any = trunk.config
    layers: Any = trunk.get_submodule(FAMILIES[config.model_type].layers)
    return cast(nn.ModuleList, layers)


def _cut(model: PreTrainedModel, last_layer: int) -> nn.Module:
    # A model that also reads images holds its language model inside.
    trunk: Any = getattr(model.base_model, "language_model", model.base_model)
    if trunk.config.model_type not in FAMILIES:
        raise ConfigurationError(
            f"the language model is not found in {type(model).__name__}; save it alone, and add "
            "its family as docs/architectures.md says"
        )
    family, layers = FAMILIES[trunk.config.model_type], decoder_layers(trunk)
    if last_layer >= len(layers):
        raise ConfigurationError(
            f"the directions reach layer {last_layer}, the model has {len(layers)} layers; "
            "use the directions of this model"
        )
    trunk.set_submodule(family.layers, layers[: last_layer + 1])
    trunk.set_submodule(family.final_norm, nn.Identity())
    trunk.config.num_hidden_layers = last_layer + 1
    return cast(nn.Module, trunk)
