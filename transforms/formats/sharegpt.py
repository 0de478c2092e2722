"""ShareGPT: `conversations`, a list of `{from, value}`."""

from collections.abc import Mapping
from typing import Any

from schemas.records import Message
from transforms.formats.base import Format, bad_message, clean, kind, role_of, turns

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def _recognises(record: Mapping[str, Any]) -> bool:
    return "conversations" in record


def _read(record: Mapping[str, Any]) -> list[Message]:
    items = turns(record, "conversations")
    return [_message(item, f"conversations[{index}]") for index, item in enumerate(items)]


def _message(item: Mapping[str, Any], place: str) -> Message:
    role = role_of(item.get("from"), _ROLES, place)
    value = item.get("value")
    if not isinstance(value, str):
        raise bad_message(place, f"value is not a string but {kind(value)}")
    return Message(role, clean(value))


FORMAT = Format("sharegpt", _recognises, _read)
