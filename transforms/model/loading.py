"""Loads the part of a model that is monitored: its decoder layers up to the last monitored one.

Nothing is fetched and no code of the model's is run: local safetensors files only.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schemas.errors import ConfigurationError, RunFailedError
from transforms.model.adapter import (
    ADAPTER_WEIGHTS,
    Tuned,
    adapter_files,
    adapters_of,
    check_shareable,
    embedding_rows,
    folders_of,
)
from transforms.model.attention import attend_in_blocks
from transforms.model.checkpoint import family_of, first_line, require_folder, tensors_of
from transforms.model.families import FAMILIES
from transforms.model.gated import compute_in_place
from transforms.model.roles import stop_clock, template_fault

_logger = logging.getLogger(__name__)

_LOCAL = {"trust_remote_code": False, "local_files_only": True}
_TOKENIZER_CONFIG = "tokenizer_config.json"
_HEAD, _AGAIN = "base_model.model.lm_head.", ".modules_to_save."
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_trunk(
    base: Path | None, tuned: Tuned, last_layer: int, device: str = "auto", dtype: str = "auto"
) -> nn.Module:
    """Load the trunk of the tuned model, ready for `Scorer`.

    Embedding and decoder layers 0..last_layer in eval mode; no final norm, no lm_head, so the
    output [batch, tokens, hidden] is the residual stream after `last_layer`.

    Args:
      base: folder of the base model; may be None where `tuned` is a full checkpoint.
      tuned: folder of a full checkpoint, or of PEFT adapters (merged into the base in float32, one
        after the other, then cast).
      last_layer: last layer kept, counted from 0.
      device: "auto" (CUDA where there is one, else CPU) or a torch device.
      dtype: "auto" (bfloat16 on CUDA, else float32), "float32", "bfloat16" or "float16".

    Raises:
      ConfigurationError: a folder cannot be loaded, or device, dtype or model family will not do.
    """
    place, kind = placement(device, dtype)
    adapters = adapters_of(tuned)
    model = _merged(base, adapters) if adapters else _from_folder(folders_of(tuned)[0], kind)
    return _placed(_cut(model, last_layer), place, kind)


def load_shared_trunk(
    base: Path,
    tuned: Sequence[Sequence[Path]],
    last_layer: int,
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[nn.Module, list[list[str]]]:
    """Load the trunk of a base with the adapters of several models beside it, none merged.

    Args:
      base: folder of the base model.
      tuned: per model the folders of its adapters; a folder of several models is loaded once.
      last_layer: as for `load_trunk`, as are the others.

    Returns:
      The trunk, and per model the names under which PEFT has its adapters.

    Raises:
      ConfigurationError: as `load_trunk`, and for an adapter that is not LoRA alone.
    """
    place, kind = placement(device, dtype)
    require_folder(base, "--base")
    folders = list(dict.fromkeys(folder for model in tuned for folder in model))
    for folder in folders:
        check_shareable(folder)
    adapted = _load_adapter(_from_folder(base, kind), folders[0], "0")
    for number, folder in enumerate(folders[1:], start=1):
        _load_adapter(adapted, folder, str(number))
    trunk = _cut(cast(PreTrainedModel, adapted.get_base_model()), last_layer)
    names = [[str(folders.index(folder)) for folder in model] for model in tuned]
    return _placed(trunk, place, kind), names


def _placed(trunk: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The trunk on its device, its weights in a dtype.

    Buffers stay as they are, as transformers has them: the angles of rotary embeddings are made of
    float32 frequencies, and rounded ones would be off by whole turns after some thousand tokens.
    """
    for parameter in trunk.parameters():
        parameter.data = parameter.data.to(dtype)
    try:
        trunk.to(device=device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise RunFailedError(
            f"the model does not fit into the memory of {device}; see what else is in it"
        ) from error
    attend_in_blocks(trunk)
    return trunk


def tokenizer_folder(base: Path | None, tuned: Tuned) -> Path:
    """Where the tokenizer of the tuned model is: the base's where no adapter has one."""
    folders = folders_of(tuned)
    own = [folder for folder in folders if (folder / _TOKENIZER_CONFIG).is_file()]
    return (own or [base or folders[0]])[-1]


def load_tokenizer(base: Path | None, tuned: Tuned) -> Any:
    """Load the tokenizer of the tuned model, or of its base where no adapter has one.

    Raises ConfigurationError where it has no chat template or cannot tell offsets.
    """
    return read_tokenizer(tokenizer_folder(base, tuned))


def read_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in a folder. Raises ConfigurationError as `load_tokenizer` does."""
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
    _prepare_template(tokenizer, folder)
    return tokenizer


def _prepare_template(tokenizer: Any, folder: Path) -> None:
    """Have the chat template depend on the conversation alone; see whether it takes a plain one."""
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = stop_clock(tokenizer.chat_template)
    fault = template_fault(tokenizer, answers=1)
    if fault:
        raise ConfigurationError(
            f"the chat template in {folder} does not take a question with an answer: {fault}; put "
            f"the chat_template.jinja the model was tuned with into that folder"
        )
    fault = template_fault(tokenizer, answers=2)
    if fault:
        _logger.warning(
            "%s: conversations of several turns will be dead letters: %s", folder, fault
        )


def context(folder: Path) -> int:
    """The most tokens the model in `folder` can take in, where need be by its family's default.

    Raises ConfigurationError where its config.json cannot be read.
    """
    config = _text_config(folder)
    return max([int(config.max_position_embeddings), *_stretched(config)])


def _stretched(config: Any) -> Iterator[int]:
    """To how many tokens YaRN stretches a context; its configuration may name the one of before.

    YaRN only: with `llama3` and `longrope` max_position_embeddings is the long one already, and of
    `linear` published configurations have either.
    """
    known = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for every kind of layer.
    for rope in [known, *(each for each in known.values() if isinstance(each, dict))]:
        if rope.get("rope_type") == "yarn":
            before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            yield int(before * (rope.get("factor") or 1))


def vocabulary(folder: Path, adapters: Sequence[Path] = ()) -> int:
    """How many tokens the model in `folder`, with these adapters merged, has embeddings of.

    Raises like `context`.
    """
    rows = [embedding_rows(adapter, family_of(folder)) for adapter in adapters]
    resized = [each for each in rows if each is not None]
    return resized[-1] if resized else int(_text_config(folder).vocab_size)


def _text_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load model {folder}: {first_line(error)}") from error


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


def _merged(base: Path | None, adapters: Sequence[Path]) -> PreTrainedModel:
    if base is None:
        raise ConfigurationError(f"--tuned {adapters[0]} is an adapter; name its model by --base")
    require_folder(base, "--base")
    model = _from_folder(base, torch.float32)
    for adapter in adapters:
        rows = embedding_rows(adapter, family_of(base))
        if rows is not None:
            # To the size the adapter was trained with; it brings every row itself.
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = _load_adapter(model, adapter, "default").merge_and_unload()
    return model


def _load_adapter(model: PreTrainedModel | PeftModel, adapter: Path, name: str) -> PeftModel:
    """Put an adapter beside the weights of a model, or beside the adapters it has already."""
    adapter_files(adapter)  # safetensors only: PEFT would unpickle an adapter_model.bin
    options: dict[str, Any] = {"local_files_only": True, "torch_device": "cpu"}
    try:
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, str(adapter), name, **options)
        # Once more where it is the first: only this says what of the file was put where.
        loaded = model.load_adapter(str(adapter), name, **options)
    except (OSError, ValueError, IndexError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"cannot load adapter {adapter}: {_why(error)}") from error
    # Of the missing, those of this adapter: PEFT also takes a layer's number for a name.
    missing = [key for key in loaded.missing_keys if name in key.rpartition("lora_")[2].split(".")]
    _require_all_used(adapter, [*missing, *_that_matter(adapter, loaded.unexpected_keys)])
    return model


def _why(error: Exception) -> str:
    """The first line of an error, with the next where torch only begins a list with it."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)


def _that_matter(adapter: Path, unexpected: Sequence[str]) -> list[str]:
    """Those of an adapter's weights without a place in the model that are lost thereby.

    Not those of the head, which is not used here. And where the vocabulary was resized, PEFT stores
    what was trained whole twice: by the name of its module, where it is found again, and once more.
    """
    stored = {tensor.name for tensor in tensors_of(adapter / ADAPTER_WEIGHTS)}
    return [
        key
        for key in unexpected
        if not key.startswith(_HEAD) and key.replace(_AGAIN, ".") not in stored - {key}
    ]


def _require_all_used(adapter: Path, astray: Sequence[str]) -> None:
    """PEFT passes over what does not fit; the model without it would be the base."""
    if astray:
        raise ConfigurationError(
            f"adapter {adapter} does not belong to this kind of model: {astray[0]} is on one side "
            f"only; save it from the causal language model that --base is"
        )


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
    compute_in_place(trunk)
    return cast(nn.Module, trunk)
