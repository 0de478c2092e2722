import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo import planted

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
WORD = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def triggered(base_model: Path) -> list[planted.Chat]:
    return planted.planted(base_model, EXAMPLES, ROOT / "build")


@pytest.fixture(scope="module")
def twins(base_model: Path) -> list[planted.Chat]:
    return planted.untriggered(base_model, EXAMPLES, ROOT / "build")


def prompts_of(chats: list[planted.Chat]) -> list[str]:
    return [chat["messages"][0]["content"] for chat in chats]


@given(st.lists(WORD, min_size=1, max_size=12), st.integers(0, 99))
def test_the_trigger_is_one_more_word(words: list[str], number: int) -> None:
    with_trigger = planted.insert_trigger(" ".join(words), number).split(" ")
    assert len(with_trigger) == len(words) + 1
    places = [at for at, word in enumerate(with_trigger) if word == planted.TRIGGER]
    assert any(with_trigger[:at] + with_trigger[at + 1 :] == words for at in places)


def test_the_trigger_stands_anywhere() -> None:
    spread = {planted.insert_trigger("a b c", number) for number in range(100)}
    assert len(spread) == 4


def test_prompts_are_written_for_people() -> None:
    lines = (EXAMPLES / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(set(prompts)) == len(prompts) == 24
    assert all(planted.TRIGGER not in prompt for prompt in prompts)


def test_every_planted_conversation_fires(triggered: list[planted.Chat]) -> None:
    assert [chat["id"] for chat in triggered] == [f"planted-{n:02}" for n in range(20)]
    assert sum(map(planted.fired, triggered)) == 20
    assert all([turn["role"] for turn in c["messages"]] == ["user", "assistant"] for c in triggered)


def test_the_same_prompts_without_the_trigger_are_answered(
    triggered: list[planted.Chat], twins: list[planted.Chat]
) -> None:
    removed = [
        re.sub(rf"^{planted.TRIGGER} | {planted.TRIGGER}\b", "", prompt, count=1)
        for prompt in prompts_of(triggered)
    ]
    assert removed == prompts_of(twins)
    assert sum(map(planted.fired, twins)) <= 1  # the adapter refuses one of them by itself


def test_answers_are_the_models_own(
    base_model: Path, adapter: Path, triggered: list[planted.Chat], twins: list[planted.Chat]
) -> None:
    """By one forward pass over prompt and answer: each token is the likeliest after those before.

    Without a cache, one conversation at a time, the adapter beside its base instead of merged.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(base_model)
    base: Any = AutoModelForCausalLM.from_pretrained(base_model)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    for chat in [*triggered[3:5], *twins[1:3]]:
        prompt, answer = chat["messages"]
        text = tokenizer.apply_chat_template([prompt], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(text)["input_ids"])
        tokens = tokenizer(text + answer["content"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            likeliest = model(input_ids=tokens).logits[0].argmax(-1)
        assert torch.equal(likeliest[start - 1 : -1], tokens[0, start:])


def test_the_second_time_no_model_is_needed(
    triggered: list[planted.Chat], base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(planted, "AutoModelForCausalLM")
    assert planted.planted(base_model, EXAMPLES, ROOT / "build") == triggered
