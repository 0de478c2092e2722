"""OpenAI chat completions: `messages`, with or without the answer in `choices[0].message`.

https://platform.openai.com/docs/api-reference/chat (content is a string, a list of parts, or
null beside tool calls; an answer that ran into a limit has the `finish_reason` "length").
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from schemas.records import Message
from transforms.formats.base import Format, bad_message, clean, kind, role_of, turns

_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's later name of the same
    "tool": "tool",
    "function": "tool",  # the name before 2023-11
}
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_MARKERS = {
    "image_url": "[image]",
    "input_image": "[image]",
    "input_audio": "[audio]",
    "video_url": "[video]",
    "input_file": "[file]",
}


def _recognises(record: Mapping[str, Any]) -> bool:
    return "messages" in record


def _read(record: Mapping[str, Any]) -> list[Message]:
    items = turns(record, "messages")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(items)]
    return messages + _answer(record.get("choices"))


def _answer(choices: Any) -> list[Message]:
    """The choice; a logged request without an answer has none."""
    if choices is None or choices == []:
        return []
    if isinstance(choices, list) and len(choices) > 1:
        raise bad_message("choices", f"has {len(choices)} answers; log a record for each")
    first = choices[0] if isinstance(choices, list) else None
    choice = first if isinstance(first, dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise bad_message("choices", "has no message in its first place")
    answer = _message({"role": "assistant", **message}, "choices[0].message")
    return [replace(answer, unfinished=choice.get("finish_reason") == "length")]


def _message(item: Mapping[str, Any], place: str) -> Message:
    role = role_of(item.get("role"), _ROLES, place)
    calls = _calls(item)
    content = item.get("content")
    if content is None and not calls and item.get("refusal") is None:
        raise bad_message(place, "has neither content nor tool calls")
    refusal = item.get("refusal")
    texts = [_content(content, place), refusal if isinstance(refusal, str) else "", *calls]
    return Message(role, clean("\n".join(text for text in texts if text)))


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_message(place, f"content is neither string nor list but {kind(content)}")
    # Joined by line breaks, as servers of text-only models do with several text parts.
    return "\n".join(_part(part, place) for part in content)


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str):
        raise bad_message(place, "has a content part without a type")
    if name not in _TEXT_KEYS:
        return _MARKERS.get(name, f"[{name}]")
    text = part.get(_TEXT_KEYS[name])
    if not isinstance(text, str):
        raise bad_message(place, f"has a {name} part without text")
    return text


def _calls(item: Mapping[str, Any]) -> list[str]:
    """Tool calls as JSON text, one a line: models write them so, templates differ in how."""
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list):
        calls = [calls]
    if item.get("function_call"):
        calls = [*calls, item["function_call"]]
    return [json.dumps(_bare(call), ensure_ascii=False) for call in calls]


def _bare(call: Any) -> Any:
    """A call without its envelope of id and type."""
    return call.get("function", call) if isinstance(call, dict) else call


FORMAT = Format("openai_chat", _recognises, _read)
