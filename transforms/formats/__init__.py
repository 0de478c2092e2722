"""From the bytes of a log entry to a conversation. A new log shape: one file and one line here."""

from typing import Any

from schemas.reasons import Reason
from schemas.records import Conversation, Message
from transforms import json_text
from transforms.formats import openai_chat, sharegpt
from transforms.formats.base import DecodeError, Format, clean, kind

__all__ = ["FORMATS", "DecodeError", "Format", "parse"]

FORMATS: tuple[Format, ...] = (
    openai_chat.FORMAT,
    sharegpt.FORMAT,
)
"""Asked in this order; the first that recognises a record reads it."""

_ID_KEYS = ("id", "conversation_id")
_MAX_ID_CHARACTERS = 512
"""An alert repeats the id, and must fit into a Kafka message whatever was logged."""


def parse(value: bytes) -> Conversation:
    """The conversation in one log entry.

    Raises DecodeError with one of BAD_ENCODING, BAD_JSON, UNKNOWN_FORMAT, BAD_MESSAGES and
    EMPTY_CONVERSATION, and nothing else, whatever the bytes.
    """
    record = _load(value)
    if not isinstance(record, dict):
        raise DecodeError(Reason.UNKNOWN_FORMAT, f"not an object but {kind(record)}")
    messages = _read(record)
    if not any(message.content.strip() for message in messages):
        raise DecodeError(Reason.EMPTY_CONVERSATION, f"{len(messages)} messages without any text")
    return Conversation(_identify(record), tuple(messages), _model(record))


def _load(value: bytes) -> Any:
    try:
        # Writers on Windows begin with a byte order mark, which JSON itself does not know.
        return json_text.load(value.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} is not UTF-8: {error.reason}"
        raise DecodeError(Reason.BAD_ENCODING, detail) from error
    except ValueError as error:
        raise DecodeError(Reason.BAD_JSON, str(error)) from error


def _read(record: dict[str, Any]) -> list[Message]:
    for candidate in FORMATS:
        if candidate.recognises(record):
            return candidate.read(record)
    keys = ", ".join(ascii(key)[:40] for key in list(record)[:8])
    raise DecodeError(Reason.UNKNOWN_FORMAT, f"no format knows an object with keys: {keys}")


def _model(record: dict[str, Any]) -> str | None:
    """What the record says of its model; not of every log, and only as a string."""
    value = record.get("model")
    return clean(value) if isinstance(value, str) and value else None


def _identify(record: dict[str, Any]) -> str | None:
    """The record's own id; other types than string and integer are no ids, nor are long texts."""
    for key in _ID_KEYS:
        value = record.get(key)
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if 0 < len(text) <= _MAX_ID_CHARACTERS:
            return clean(text)
    return None
