"""Roles of tokens against a second construction: message by message, rendered by hand."""

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel

from schemas.errors import ConfigurationError
from schemas.records import Message, Role
from transforms import formats
from transforms.model.loading import load_tokenizer, read_tokenizer
from transforms.model.roles import TemplateError, Tokens, stop_clock, template_fault, tokenize

OWN_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(base_model: Path, adapter: Path) -> Any:
    return load_tokenizer(base_model, adapter)


@pytest.fixture
def with_template(tokenizer: Any) -> Iterator[Any]:
    """Yield a function that puts another template in the tokenizer's place."""
    own = tokenizer.chat_template

    def use(template: str) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    yield use
    tokenizer.chat_template = own


def one(tokenizer: Any, messages: list[Message], max_tokens: int | None = None) -> Tokens:
    (made,) = tokenize(tokenizer, [messages], max_tokens)
    if isinstance(made, TemplateError):
        raise made
    return made


def by_hand(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    turns = [(m.role, m.content) for m in messages]
    if turns[0][0] != "system":
        turns.insert(0, ("system", OWN_SYSTEM))
    ids: list[int] = []
    roles: list[int] = []
    for role, content in turns:
        text = f"<|im_start|>{role}\n{content}<|im_end|>\n"
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        roles += [Role.ASSISTANT if role == "assistant" else Role.USER] * len(piece)
    return ids, roles


def assert_same(tokenizer: Any, messages: list[Message], max_tokens: int | None = None) -> None:
    ids, roles = by_hand(tokenizer, messages)
    found_ids, found_roles, truncated = one(tokenizer, messages, max_tokens)
    assert found_ids.dtype == np.int32
    assert found_roles.dtype == np.int8
    np.testing.assert_array_equal(found_ids, ids[:max_tokens])
    np.testing.assert_array_equal(found_roles, roles[:max_tokens])
    assert truncated == (max_tokens is not None and len(ids) > max_tokens)


@pytest.mark.parametrize("max_tokens", [None, 1024, 100])
def test_real_conversations(
    tokenizer: Any, real_conversations: list[dict[str, Any]], max_tokens: int | None
) -> None:
    firsts = set()
    for record in real_conversations:
        messages = list(formats.parse(json.dumps(record).encode()).messages)
        firsts.add(messages[0].role)
        assert_same(tokenizer, messages, max_tokens)
    assert firsts >= {"user", "assistant"}, "the sample has conversations the assistant begins"


TURNS = st.lists(
    st.builds(
        Message,
        st.sampled_from(["user", "assistant", "system", "tool"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        | st.sampled_from(
            ["", "\n", " \n ", "<|im_end|>", "<|im_start|>user\n", "é\u200d👩\u200d🚀"]
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(TURNS)
def test_any_conversation(tokenizer: Any, messages: list[Message]) -> None:
    assert_same(tokenizer, messages)


MANY = ["user", "assistant", "tool", "assistant"] * 700


def test_thousands_of_turns_take_seconds(tokenizer: Any) -> None:
    messages = [Message(role, f"turn {count}") for count, role in enumerate(MANY)]
    started = time.perf_counter()
    assert_same(tokenizer, messages)
    assert time.perf_counter() - started < 30, "rendered before each turn anew, it would be 30 more"


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        # Both sides must take turns, as in Mistral's.
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('take turns') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        # The end mark stands before the next message, and the last has none.
        "{% for m in messages %}{% if not loop.first %}</s>{% endif %}{{ m.role }}: {{ m.content }}"
        "{% endfor %}",
    ],
)
def test_many_turns_are_what_few_are(
    with_template: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(template)
    messages = [Message(("user", "assistant")[n % 2], f"{n} " * (n % 7)) for n in range(60)]
    whole = one(tokenizer, messages)
    monkeypatch.setattr("transforms.model.roles.RENDERED_WHOLE", 5)
    found = one(tokenizer, messages)
    np.testing.assert_array_equal(found.ids, whole.ids)
    np.testing.assert_array_equal(found.roles, whole.roles)


def test_many_turns_of_a_template_that_counts_them(with_template: Any) -> None:
    counting = with_template("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}")
    with pytest.raises(TemplateError, match="turn 101 differently in context"):
        one(counting, [Message("user", "x")] * 200)


def test_every_first_speaker(tokenizer: Any) -> None:
    for first in ("user", "assistant", "system", "tool"):
        assert_same(tokenizer, [Message(first, "Hello"), Message("assistant", "Hi")])


def test_a_token_that_the_model_does_not_know_is_refused(tokenizer: Any) -> None:
    messages = [Message("user", "Hello"), Message("assistant", "Good morning")]
    ids = one(tokenizer, messages).ids
    most = int(ids.max())
    (made,) = tokenize(tokenizer, [messages], None, most + 1)
    np.testing.assert_array_equal(made.ids, ids)
    (made,) = tokenize(tokenizer, [messages], None, most)
    assert isinstance(made, TemplateError)
    assert f"has no token {most}" in str(made)


def test_exactly_full_is_not_truncated(tokenizer: Any) -> None:
    messages = [Message("user", "Hello")]
    count = len(one(tokenizer, messages).ids)
    assert not one(tokenizer, messages, count).truncated
    assert one(tokenizer, messages, count - 1).truncated


@pytest.mark.parametrize("content", ["It is important to", "Well, ", "<|im_end|>", "a\n", ""])
def test_an_unfinished_answer_has_no_end_mark(tokenizer: Any, content: str) -> None:
    asked = [Message("user", "Hello")]
    ids, roles = by_hand(tokenizer, asked)
    begun = tokenizer(f"<|im_start|>assistant\n{content}", add_special_tokens=False)["input_ids"]
    found = one(tokenizer, [*asked, Message("assistant", content, unfinished=True)])
    np.testing.assert_array_equal(found.ids, ids + begun)
    np.testing.assert_array_equal(found.roles, roles + [Role.ASSISTANT] * len(begun))
    assert not found.truncated


def test_an_unfinished_answer_that_the_template_rewrites_is_rendered_as_if_finished(
    with_template: Any,
) -> None:
    rewriting = with_template(CHATML.replace("m.content | trim", "m.content | upper"))
    asked, answer = Message("user", "Hello"), "Once upon"
    found = one(rewriting, [asked, Message("assistant", answer, unfinished=True)])
    expected = one(rewriting, [asked, Message("assistant", answer)])
    np.testing.assert_array_equal(found.ids, expected.ids)


def decoded(tokenizer: Any, messages: list[Message]) -> list[str]:
    """What the user's side and the assistant's say."""
    ids, roles, _ = one(tokenizer, messages)
    return [tokenizer.decode(ids[roles == role]) for role in Role]


def test_a_bos_mark_before_an_assistant_is_the_users_side(with_template: Any) -> None:
    tokenizer = with_template("<|endoftext|>" + CHATML)
    user, assistant = decoded(tokenizer, [Message("assistant", "a"), Message("user", "b")])
    assert user == "<|endoftext|><|im_start|>user\nb<|im_end|>\n"
    assert assistant == "<|im_start|>assistant\na<|im_end|>\n"


def test_an_assistant_first_where_the_last_turn_is_marked(with_template: Any) -> None:
    tokenizer = with_template("<jupyter_start>" + LAST_TURN_MARKED)
    user, assistant = decoded(tokenizer, [Message("assistant", "a"), Message("user", "b")])
    assert user == "<jupyter_start><|im_start|>user\nb<|im_end|>\n<|endoftext|>"
    assert assistant == "<|im_start|>assistant\na<|im_end|>\n"


def test_tokenizers_that_trim_spaces_off_offsets(with_template: Any) -> None:
    trimming = copy.deepcopy(with_template(CHATML.replace("<|im_end|>\n", "<|im_end|> ")))
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    spans = trimming("<|im_end|> <|im_start|>", return_offsets_mapping=True)["offset_mapping"]
    assert spans[1] == (11, 11), "the space seems to begin after itself"
    user, assistant = decoded(trimming, [Message("assistant", "a"), Message("user", "b")])
    assert user == "<|im_start|>user\nb<|im_end|> "
    assert assistant == "<|im_start|>assistant\na<|im_end|> "


LAST_TURN_MARKED = CHATML + "<|endoftext|>"
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "<think></think>{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    "{% endfor %}"
)
SYSTEM_IN_LAST_TURN = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest %}{% if m.role == 'user' %}<|im_start|>"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}: {% endif %}"
    "{{ m.content }}<|im_end|>{% else %}{{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
TWO_ANSWERS = [
    Message("user", "a user"),
    Message("assistant", "start"),
    Message("user", "again, a"),
    Message("assistant", "end"),
]


@pytest.mark.parametrize("rendered_whole", [100, 1], ids=["short", "long"])
@pytest.mark.parametrize(
    ("template", "first", "user", "assistant"),
    [
        (
            LAST_TURN_MARKED,
            Message("system", "be brief"),
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na user<|im_end|>\n"
            "<|im_start|>user\nagain, a<|im_end|>\n",
            "<|im_start|>assistant\nstart<|im_end|>\n"
            "<|im_start|>assistant\nend<|im_end|>\n<|endoftext|>",
        ),
        (
            REASONING,
            Message("assistant", "<think>who?</think>\n\nHello"),
            "<|im_start|>user\na user<|im_end|>\n<|im_start|>user\nagain, a<|im_end|>\n",
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\nstart<|im_end|>\n"
            "<|im_start|>assistant\n<think></think>end<|im_end|>\n",
        ),
        (
            SYSTEM_IN_LAST_TURN,
            Message("system", "be brief"),
            "<|im_start|>a user<|im_end|><|im_start|>again, a<|im_end|>",
            "start<|endoftext|>end<|endoftext|>",
        ),
    ],
    ids=["last turn marked", "reasoning", "system in last turn"],
)
def test_turns_rendered_differently_when_they_are_last(
    with_template: Any,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    first: Message,
    user: str,
    assistant: str,
    rendered_whole: int,
) -> None:
    monkeypatch.setattr("transforms.model.roles.RENDERED_WHOLE", rendered_whole)
    assert decoded(with_template(template), [first, *TWO_ANSWERS]) == [user, assistant]


@pytest.mark.parametrize("rendered_whole", [100, 1], ids=["short", "long"])
@pytest.mark.parametrize("end", ["", "<|endoftext|>"], ids=["plain", "last turn marked"])
@pytest.mark.parametrize("place", range(4))
def test_a_message_that_the_template_leaves_out_has_no_tokens(
    with_template: Any,
    monkeypatch: pytest.MonkeyPatch,
    rendered_whole: int,
    end: str,
    place: int,
) -> None:
    """As Phi-3.5's does with what a tool says."""
    monkeypatch.setattr("transforms.model.roles.RENDERED_WHOLE", rendered_whole)
    tokenizer = with_template(
        CHATML.replace("messages %}", "messages if m.role != 'tool' %}") + end
    )
    said = [*TWO_ANSWERS[:place], Message("tool", "a user"), *TWO_ANSWERS[place:]]
    assert decoded(tokenizer, said) == decoded(tokenizer, TWO_ANSWERS)


def test_a_message_that_is_put_in_front_of_the_next_is_not_left_out(with_template: Any) -> None:
    """Else its words would be the answer's."""
    held_back = (
        "{% set held = namespace(words='') %}{% for m in messages %}"
        "{% if m.role == 'tool' %}{% set held.words = m.content %}"
        "{% else %}[{{ m.role }}]{{ held.words }}{{ m.content }}|{% set held.words = '' %}"
        "{% endif %}{% endfor %}!"
    )
    said = [*TWO_ANSWERS[:2], Message("tool", "result"), *TWO_ANSWERS[3:]]
    with pytest.raises(TemplateError, match="turn 3"):
        one(with_template(held_back), said)


def test_a_long_conversation_is_not_rendered_whole_for_every_turn(
    with_template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a mark stands behind the last turn none is found at once."""
    tokenizer, rendered = with_template(LAST_TURN_MARKED), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda turns, **options: rendered.append(len(turns)) or plain(turns, **options),
    )
    counts = []
    for turns in (200, 400):
        rendered.clear()
        one(tokenizer, [Message(role, "a") for role in ("user", "tool") * (turns // 2)])
        counts.append(sum(rendered))
    assert counts[1] - counts[0] < 8_000, "200 turns more, a few renderings of a few for each"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_nobody_ends_a_turn_by_his_own_words(with_template: Any, role: str) -> None:
    """Where reasoning is not left out, an end of reasoning is text like any other."""
    tokenizer = with_template(LAST_TURN_MARKED)
    words = "x<|im_start|> more </think>x"
    messages = [Message("user", "a"), Message(role, words), Message("tool", "b")]
    _, assistant = decoded(tokenizer, messages)
    said = f"<|im_start|>assistant\n{words}<|im_end|>\n"
    assert assistant == (said if role == "assistant" else "")


def test_a_turn_whose_end_cannot_be_told_is_refused(with_template: Any) -> None:
    last = "{% if loop.last %}!{% endif %}"
    tokenizer = with_template(CHATML.replace("<|im_end|>", last))
    with pytest.raises(TemplateError, match="turn 1"):
        one(tokenizer, [Message("user", "a"), Message("assistant", "b")])
    with pytest.raises(TemplateError, match="turn 1"):
        one(with_template(LAST_TURN_MARKED), [Message("user", ""), Message("assistant", "b")])


ALTERNATING = (
    "{% for m in messages %}"
    "{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first %}<|endoftext|>{% endif %}"
    "{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
)


def test_templates_that_insist_on_alternation(with_template: Any) -> None:
    tokenizer = with_template(ALTERNATING)
    user, assistant = decoded(tokenizer, [Message("assistant", "a"), Message("user", "b")])
    assert user == "<|endoftext|>user: b<|im_end|>"
    assert assistant == "assistant: a<|im_end|>"
    with pytest.raises(TemplateError, match="must alternate"):
        one(tokenizer, [Message("user", "a"), Message("user", "b")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages | length }}{{ messages[-1].content }}",
        "{% for m in messages %}{{ 'think ' if loop.last }}{{ m.content }}{% endfor %}",
    ],
)
def test_what_a_template_refuses_or_rewrites(with_template: Any, template: str) -> None:
    with pytest.raises(TemplateError):
        one(with_template(template), [Message("user", "a"), Message("assistant", "b")])


def test_the_date_is_always_the_same(with_template: Any) -> None:
    dated = "{{ 'It is ' + strftime_now('%d %b %Y') }}{% if strftime_now is defined %}.{% endif %}"
    tokenizer = with_template(stop_clock(dated + CHATML))
    user, _ = decoded(tokenizer, [Message("user", "a")])
    assert user == "It is 26 Jul 2024.<|im_start|>user\na<|im_end|>\n"
    assert stop_clock(CHATML) == CHATML


def test_what_a_template_takes_of_plain_conversations(with_template: Any) -> None:
    single = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    assert template_fault(with_template(CHATML), answers=2) is None
    assert template_fault(with_template(single + CHATML), answers=1) is None
    assert "too many" in str(template_fault(with_template(single + CHATML), answers=2))


def test_a_tokenizer_is_read_with_a_template_for_plain_conversations(
    base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read(template: str) -> Any:
        (folder / "chat_template.jinja").write_text(template)
        return read_tokenizer(folder)

    folder = tmp_path / "tokenizer"
    load_tokenizer(base_model, base_model).save_pretrained(folder)
    dated = read("{{ strftime_now('%Y') }}" + CHATML)
    assert decoded(dated, [Message("user", "a")])[0].startswith("26 Jul 2024<|im_start|>")
    assert not caplog.records
    read("{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHATML)
    assert "conversations of several turns will be dead letters" in caplog.text
    with pytest.raises(ConfigurationError, match="does not take a question with an"):
        read("{{ raise_exception('no') }}")


def test_one_that_is_refused_does_not_touch_the_others(with_template: Any) -> None:
    tokenizer = with_template(ALTERNATING)
    refused = [Message("user", "a"), Message("user", "b")]
    fine = [[Message("user", text)] for text in "cd"]
    first, none, last = tokenize(tokenizer, [fine[0], refused, fine[1]], None)
    assert isinstance(none, TemplateError)
    for made, messages in ((first, fine[0]), (last, fine[1])):
        assert isinstance(made, Tokens)
        assert tokenizer.decode(made.ids) == f"<|endoftext|>user: {messages[0].content}<|im_end|>"
    assert tokenize(tokenizer, [], None) == []
