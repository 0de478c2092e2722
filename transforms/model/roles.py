"""Token ids of a conversation, and whose each token is.

The conversation is rendered once by the model's own chat template and tokenised once; a token
has the role of the message whose rendering contains its first character, header and end marks
included. What the template puts in front by itself (a default system block, a BOS mark) counts
as system, that is as the user's side.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from schemas.records import Int32s, Message, Role

# What a template's expressions may raise besides jinja2's own errors, on values it did not expect.
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError)


class TemplateError(ValueError):
    """The chat template refuses a conversation, or renders it in a way no token's role fits."""


def tokenize(
    tokenizer: Any, messages: Sequence[Message], max_tokens: int | None
) -> tuple[Int32s, NDArray[np.int8], bool]:
    """Tokenise a conversation as its model sees it, without a generation prompt.

    Args:
      tokenizer: a transformers tokenizer with chat template and offsets.
      messages: at least one; any may come first.
      max_tokens: most tokens kept, from the front; None: all.

    Returns:
      token ids int32 [tokens], values of `Role` int8 [tokens], whether the end was cut off.

    Raises:
      TemplateError: see there.
    """
    text = _render(tokenizer, messages)
    # verbose=False: a warning per conversation longer than the model's context says nothing new.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoding["input_ids"][:max_tokens], np.int32)
    starts = _first_characters(encoding["offset_mapping"][:max_tokens])
    reached = int(starts.max(initial=0))
    roles = _roles_at(starts, _ends(tokenizer, messages, text, reached))
    return ids, roles, len(ids) < len(encoding["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=False
        )
    except _TEMPLATE_FAULTS as error:
        raise TemplateError(f"the chat template refuses it: {error}") from error
    return text


def _first_characters(offsets: Sequence[tuple[int, int]]) -> NDArray[np.intp]:
    """Index of every token's first character in the text."""
    spans = np.array(offsets, np.intp).reshape(-1, 2)
    # Byte-level tokenizers may trim spaces off offsets: a lone space then starts where it ends.
    return np.maximum(np.minimum(spans[:, 0], spans[:, 1] - 1), 0)


def _ends(
    tokenizer: Any, messages: Sequence[Message], text: str, reached: int
) -> list[tuple[int, Role]]:
    """Where the template's own front and the messages end in `text`, and whose they are.

    Stops at the first end beyond the character `reached`: a cut conversation of thousands of
    turns would otherwise be rendered thousands of times.
    """
    ends = [(len(_own_front(tokenizer, messages[0])), Role.USER)]
    for count, message in enumerate(messages, 1):
        prefix = text if count == len(messages) else _render(tokenizer, messages[:count])
        if not text.startswith(prefix) or len(prefix) < ends[-1][0]:
            raise TemplateError(f"the chat template renders turn {count} differently in context")
        ends.append((len(prefix), _side(message)))
        if len(prefix) > reached:
            break
    return ends


def _side(message: Message) -> Role:
    return Role.ASSISTANT if message.role == "assistant" else Role.USER


def _roles_at(starts: NDArray[np.intp], ends: list[tuple[int, Role]]) -> NDArray[np.int8]:
    places = np.array([end for end, _ in ends])
    sides = np.array([side for _, side in ends], np.int8)
    return sides[np.searchsorted(places, starts, side="right")]


def _own_front(tokenizer: Any, first: Message) -> str:
    """What the template puts before a conversation's first message by itself.

    Matters, and is asked for, only where the assistant speaks first: otherwise both are the
    user's side.
    """
    if _side(first) == Role.USER:
        return ""
    alone = _render(tokenizer, [first])
    for context in ([first], [first, Message("user", "?")]):
        try:
            before = _render(tokenizer, context)
            after = _render(tokenizer, [*context, first])
        except TemplateError:
            continue  # a template that insists on alternation
        again = after.removeprefix(before)
        if again and len(again) < len(after) and alone.endswith(again):
            return alone.removesuffix(again)
    raise TemplateError("the chat template renders a first assistant turn unlike a later one")
