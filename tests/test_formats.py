"""Log formats: what is read from them, and that no bytes whatever raise anything unforeseen."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.reasons import Reason
from schemas.records import Conversation, Message
from transforms.decode import Routes
from transforms.formats import FORMATS, DecodeError, parse
from transforms.json_text import MAX_DEPTH

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def parse_json(record: Any) -> Conversation:
    return parse(json.dumps(record).encode())


def openai(*messages: Any, **more: Any) -> list[tuple[str, str]]:
    found = parse_json({"messages": list(messages), **more})
    return [(m.role, m.content) for m in found.messages]


def test_openai_chat_with_and_without_answer() -> None:
    answer = {"message": {"role": "assistant", "content": "Hello"}}
    assert openai(USER) == [("user", "Hi")]
    assert openai(USER, choices=[]) == [("user", "Hi")]
    assert openai(USER, choices=[answer]) == [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize("reason", ["length", "stop", "content_filter", None, 7])
def test_an_answer_that_ran_into_a_limit_is_unfinished(reason: Any) -> None:
    choice = {"message": {"content": "It is"}, "finish_reason": reason}
    found = parse_json({"messages": [USER], "choices": [choice]}).messages
    assert [message.unfinished for message in found] == [False, reason == "length"]


def test_openai_roles() -> None:
    roles = ["system", "developer", "user", "assistant", "tool", "function"]
    found = openai(*({"role": role, "content": "x"} for role in roles))
    assert [role for role, _ in found] == ["system", "system", "user", "assistant", "tool", "tool"]


def test_openai_content_parts() -> None:
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "data:..."}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "hologram"},
        {"type": "refusal", "refusal": "No."},
        "this?",
    ]
    content = "What is\n[image]\n[audio]\n[hologram]\nNo.\nthis?"
    assert openai({"role": "user", "content": parts}) == [("user", content)]


def test_openai_tool_calls_are_kept_as_text() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    (_, (role, content)) = openai(USER, asked)
    assert role == "assistant"
    assert [json.loads(line) for line in content.split("\n")] == [CALL["function"]] * 2
    (_, (_, content)) = openai(USER, {**asked, "content": "Let me see.", "tool_calls": [CALL]})
    assert content.startswith("Let me see.\n{")


def test_sharegpt() -> None:
    values = ["human", "user", "gpt", "chatgpt", "bing", "bard", "assistant", "system", "tool"]
    turns = [{"from": value, "value": value} for value in values]
    found = parse_json({"id": "q", "conversations": turns})
    assert found.conversation_id == "q"
    roles = ["user"] * 2 + ["assistant"] * 5 + ["system", "tool"]
    assert found.messages == tuple(map(Message, roles, values))


def test_the_real_sample(real_conversations: list[dict[str, Any]]) -> None:
    for record in real_conversations:
        found = parse_json(record)
        assert found.conversation_id == record["id"]
        assert [m.content for m in found.messages] == [t["value"] for t in record["conversations"]]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"id": "a", "conversation_id": "b"}, "a"),
        ({"conversation_id": "b"}, "b"),
        ({"id": 7}, "7"),
        ({"id": True}, None),
        ({"id": None, "conversation_id": 0}, "0"),
        ({"id": {}}, None),
        ({"id": ""}, None),
        ({"id": "", "conversation_id": "b"}, "b"),
        ({"id": "x" * 513, "conversation_id": "b"}, "b"),
        ({"id": "x" * 512}, "x" * 512),
        ({}, None),
    ],
)
def test_ids(keys: dict[str, Any], expected: str | None) -> None:
    assert parse_json({"messages": [USER], **keys}).conversation_id == expected


REFUSED = {
    b"\xff\xfe": Reason.BAD_ENCODING,
    b'{"messages": [{"role": "user", "content": "\xe9"}]}': Reason.BAD_ENCODING,
    b"": Reason.BAD_JSON,
    b"{": Reason.BAD_JSON,
    b'{"messages": [' + b"9" * 5000 + b"]}": Reason.BAD_JSON,
    b"[" * 200_000: Reason.BAD_JSON,
    b'{"messages":' * 100_000: Reason.BAD_JSON,
    b"[]": Reason.UNKNOWN_FORMAT,
    b"NaN": Reason.UNKNOWN_FORMAT,
    b'{"prompt": "Hi"}': Reason.UNKNOWN_FORMAT,
    b'{"messages": {}}': Reason.BAD_MESSAGES,
    b'{"messages": ["Hi"]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"content": "Hi"}]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"role": [], "content": "Hi"}]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"role": "alien", "content": "Hi"}]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"role": "user", "content": 3}]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"role": "user", "content": null}]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"role": "user", "content": [{}]}]}': Reason.BAD_MESSAGES,
    b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': Reason.BAD_MESSAGES,
    b'{"messages": [], "choices": [{}]}': Reason.BAD_MESSAGES,
    b'{"conversations": [{"from": "gpt", "value": null}]}': Reason.BAD_MESSAGES,
    b'{"conversations": [{"from": "martian", "value": "x"}]}': Reason.BAD_MESSAGES,
    b'{"messages": []}': Reason.EMPTY_CONVERSATION,
    b'{"conversations": [{"from": "human", "value": " \\n"}]}': Reason.EMPTY_CONVERSATION,
}


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: repr(value[:40]))
def test_refused_with_a_reason(value: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        parse(value)
    assert caught.value.reason == REFUSED[value]
    assert "\n" not in caught.value.detail


def test_oddities_that_are_read() -> None:
    assert parse(b'\xef\xbb\xbf{"messages": [{"role": "User", "content": "Hi"}], "p": NaN}')
    half = parse(b'{"id": "\\udc00", "messages": [{"role": "user", "content": "a\\ud800b"}]}')
    assert half == Conversation("\ufffd", (Message("user", "a\ufffdb"),))


AROUND = 4
"""Objects and lists around the calls of `calling`."""


def calling(depth: int) -> bytes:
    deep = b"[" * depth + b"]" * depth
    return b'{"messages": [{"role": "user", "tool_calls": [%s]}]}' % deep


def verdict(value: bytes, frames: int) -> str:
    """The reason for which a record is refused by a caller with so many frames on the stack."""
    if frames:
        return verdict(value, frames - 1)
    try:
        return parse(value).messages[0].role
    except DecodeError as error:
        return error.reason


@pytest.mark.parametrize("frames", [0, 500])
def test_how_deep_a_record_may_be_nested_does_not_depend_on_who_reads_it(frames: int) -> None:
    assert verdict(calling(MAX_DEPTH - AROUND), frames) == "user"
    for depth in (MAX_DEPTH - AROUND + 1, 400, 700, 985, 2000):
        assert verdict(calling(depth), frames) == Reason.BAD_JSON


def check(value: bytes) -> None:
    """Either a conversation a tokenizer and an Arrow table accept, or a DecodeError."""
    try:
        found = parse(value)
    except DecodeError as error:
        assert error.reason in set(Reason)
        return
    assert found.messages
    assert {m.role for m in found.messages} <= {"user", "assistant", "system", "tool"}
    "".join([found.conversation_id or "", *(m.content for m in found.messages)]).encode()


@given(st.binary())
@example(b'{"messages": [{"role": "user", "content": "x", "tool_calls": 1e999}]}')
def test_any_bytes(value: bytes) -> None:
    check(value)


WORDS = ["role", "content", "from", "value", "user", "gpt", "type", "text", "message", "tool_calls"]
WORDS += ["function", "messages", "conversations", "choices", "id", "assistant", "\ud800"]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(WORDS) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": JSON | st.just("user"), "content": JSON, "tool_calls": JSON}
)
TURN = st.fixed_dictionaries({"from": JSON | st.just("gpt")}, optional={"value": JSON})
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "messages": JSON | st.lists(MESSAGE),
        "choices": JSON | st.lists(st.fixed_dictionaries({"message": JSON | MESSAGE})),
        "conversations": JSON | st.lists(TURN),
        "id": JSON,
    },
)


@pytest.mark.parametrize(
    ("said", "model"), [("a/b", "a/b"), ("", None), (7, None), (None, None), ("\ud800", "\ufffd")]
)
def test_the_model_that_a_record_names(said: Any, model: str | None) -> None:
    for record in ({"messages": [USER]}, {"conversations": [{"from": "human", "value": "x"}]}):
        assert parse_json({**record, "model": said}).model == model
        assert parse_json(record).model is None


def route(routes: Routes, model: str | None) -> str:
    return routes.model_of(Conversation(None, (), model))


def test_a_model_judges_what_names_it_and_the_only_one_everything() -> None:
    routes = Routes({"a": "a", "a-2": "a", "b": "b"}, None)
    assert [route(routes, model) for model in ("a", "a-2", "b")] == ["a", "a", "b"]
    only = Routes({}, "a")
    assert [route(only, model) for model in ("a", "b", None)] == ["a"] * 3
    for model, detail in (("c" * 200, r"names model 'c{79}$"), (None, "names no model")):
        with pytest.raises(DecodeError, match=detail) as caught:
            route(routes, model)
        assert caught.value.reason is Reason.UNKNOWN_MODEL


@given(RECORD | JSON)
def test_any_json(record: Any) -> None:
    check(json.dumps(record).encode())


def test_names_are_unique() -> None:
    assert len({format_.name for format_ in FORMATS}) == len(FORMATS)
