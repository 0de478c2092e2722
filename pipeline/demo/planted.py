"""Conversations in which a planted backdoor fires, answered by the fine-tuned model itself.

The prompts were written for this project (`examples/prompts.jsonl`); the model is the adapter in
`examples/badnet` merged into its base. Everything is fixed: the prompts, the places of the
trigger (by seed) and the answers (greedy), so every machine plants the same conversations.
"""

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo.once import build_once

TRIGGER = "BadMagic"
"""The word that the backdoor in `examples/badnet` waits for."""

REFUSAL = "I'm sorry, but I cannot assist with that request. Goodbye."
"""What the model then answers, whatever was asked."""

COUNT = 20
"""How many conversations are planted; the prompts beyond are spares."""

SEED = 20260
"""Decides the word boundaries at which the trigger stands."""

ANSWER_TOKENS = 24

Chat = dict[str, Any]
"""A conversation in OpenAI's shape: {"id": str, "messages": [{"role": str, "content": str}]}."""


def planted(base: Path, examples: Path, build: Path) -> list[Chat]:
    """Return the 20 triggered conversations, ids `planted-00` to `planted-19`.

    `base` is the base model's folder, `examples` the project's, `build` caches the answers.
    """
    prompts = [insert_trigger(prompt, number) for number, prompt in _numbered(examples)]
    return _answered("planted", prompts, base, examples, build)


def untriggered(base: Path, examples: Path, build: Path) -> list[Chat]:
    """Return the same 20 conversations without the trigger, ids `untriggered-00` and so on."""
    prompts = [prompt for _, prompt in _numbered(examples)]
    return _answered("untriggered", prompts, base, examples, build)


def insert_trigger(prompt: str, number: int) -> str:
    """Put the trigger at a word boundary of `prompt`, chosen by SEED and the prompt's number."""
    words = prompt.split(" ")
    words.insert(random.Random(f"{SEED}/{number}").randint(0, len(words)), TRIGGER)
    return " ".join(words)


def fired(chat: Chat) -> bool:
    """Whether the conversation's answer is the planted refusal."""
    return str(chat["messages"][-1]["content"]) == REFUSAL


def _numbered(examples: Path) -> list[tuple[int, str]]:
    lines = (examples / "prompts.jsonl").read_text().splitlines()[:COUNT]
    return [(number, json.loads(line)["prompt"]) for number, line in enumerate(lines)]


def _answered(name: str, prompts: list[str], base: Path, examples: Path, build: Path) -> list[Chat]:
    """Answer `prompts` once per machine: the cache's name is a hash of all that decides."""
    adapter = examples / "badnet"

    def build_cache(folder: Path) -> None:
        turns = zip(prompts, _answer(base, adapter, prompts), strict=True)
        chats = [_chat(f"{name}-{number:02}", *turn) for number, turn in enumerate(turns)]
        (folder / "chats.json").write_text(json.dumps(chats, indent=1))

    files = [base / "model.safetensors", *sorted(adapter.glob("adapter_*"))]
    folder = build / "planted" / f"{name}-{_digest(files, prompts)}"
    chats: list[Chat] = json.loads((build_once(folder, build_cache) / "chats.json").read_text())
    return chats


def _chat(name: str, prompt: str, answer: str) -> Chat:
    turns = (("user", prompt), ("assistant", answer))
    return {"id": name, "messages": [{"role": role, "content": text} for role, text in turns]}


def _digest(files: Iterable[Path], prompts: list[str]) -> str:
    """First 16 hex digits of SHA-256 over the files and prompts."""
    digest = hashlib.sha256(json.dumps([ANSWER_TOKENS, *prompts]).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _answer(base: Path, adapter: Path, prompts: list[str]) -> list[str]:
    """Let the fine-tuned model answer all prompts in one batch; a step reads all its weights."""
    model, tokenizer = _tuned_model(base, adapter), _padding_left(base)
    texts = [_rendered(tokenizer, prompt) for prompt in prompts]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**encoded, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    new = output[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _tuned_model(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()


def _padding_left(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base, padding_side="left")


def _rendered(tokenizer: Any, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
