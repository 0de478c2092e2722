"""What every log format is made of, and how one refuses a record."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.reasons import Reason
from schemas.records import Message

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class DecodeError(ValueError):
    """A record that no conversation can be read from, with the reason for its dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """Keep `reason` and `detail` (one line, without the conversation's text)."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[Reason, str]]:
        """Pickle by the two arguments (workers send exceptions to each other)."""
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class Format:
    """One log shape. `read` may raise DecodeError and nothing else."""

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]  # by keys only; values may be unusable
    read: Callable[[Mapping[str, Any]], list[Message]]


def clean(text: str) -> str:
    """Replace lone surrogates (JSON can escape half a pair) by U+FFFD.

    This is what encoders do (WHATWG Encoding Standard, USVString), hence what the model was
    given; tokenizers and Arrow refuse such strings.
    """
    return _LONE_SURROGATE.sub("\ufffd", text)


def bad_message(place: str, what: str) -> DecodeError:
    """The error for an unusable message at `place`, e.g. "messages[2]"."""
    return DecodeError(Reason.BAD_MESSAGES, f"{place}: {what}")


def turns(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The list of objects under `key`. Raises DecodeError(BAD_MESSAGES)."""
    items = record[key]
    if not isinstance(items, list):
        raise bad_message(key, f"is not a list but {kind(items)}")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise bad_message(f"{key}[{index}]", f"is not an object but {kind(item)}")
    return items


def role_of(value: Any, roles: Mapping[str, str], place: str) -> str:
    """The standard role for a log's own name of it. Raises DecodeError(BAD_MESSAGES)."""
    if not isinstance(value, str):
        raise bad_message(place, f"role is not a string but {kind(value)}")
    role = roles.get(value.strip().lower())
    if role is None:
        raise bad_message(place, f"unknown role {ascii(value)[:40]}")
    return role


def kind(value: Any) -> str:
    """JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
