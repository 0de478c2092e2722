"""JSON of a log entry, with a bound on its depth.

Python's parser gives up where the stack ends, so how deep it reads depends on who calls it: the
planner and the reader, which both date a record, would not always agree.
"""

import json
from typing import Any

MAX_DEPTH = 200
"""Objects and lists inside each other. All callers have room on the stack for so many."""


def load(text: str | bytes) -> Any:
    """The value that `text` holds.

    Raises ValueError where it is no JSON, not UTF-8, has an integer beyond Python's limit of
    digits, or is nested more than MAX_DEPTH deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = _nested([value])
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _nested(each)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _nested(value: dict[str, Any] | list[Any]) -> list[Any]:
    """The objects and lists in one."""
    children = value.values() if isinstance(value, dict) else value
    return [child for child in children if isinstance(child, dict | list)]
