"""Token ids of a conversation, and whose each token is.

The conversation is rendered once by the model's own chat template and tokenised once; a token
has the role of the message whose rendering contains its first character, header and end marks
included. What the template puts in front by itself (a default system block, a BOS mark) counts
as system, that is as the user's side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import jinja2
import numpy as np
from numpy.typing import NDArray

from schemas.records import Int32s, Message, Role

# What a template's expressions may raise besides jinja2's own errors, on values it did not expect.
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError)

RENDERED_WHOLE = 100
"""Up to so many turns all that stands before a turn is rendered to find its end; beyond, the time
for that would grow with the square of the turns, and a record of a megabyte could take minutes."""

TODAY = "26 Jul 2024"
"""What a template is told that asks for the date: what Llama 3's take where they cannot ask."""

_CLOCK = "strftime_now"

REASONING_END = "</think>"
"""Up to it an answer is reasoning, which the templates of models that reason leave out later."""

_T = TypeVar("_T")
_Encoded = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and of each token the first character and the one after its last."""


class TemplateError(ValueError):
    """The chat template refuses a conversation, or renders it in a way no token's role fits."""


class Tokens(NamedTuple):
    """A conversation as its model sees it.

    Attributes:
      ids: int32 [tokens].
      roles: values of `Role`, int8 [tokens].
      truncated: whether the end was cut off.
    """

    ids: Int32s
    roles: NDArray[np.int8]
    truncated: bool


def tokenize(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int | None,
    vocabulary: int | None = None,
) -> list[Tokens | TemplateError]:
    """Tokenise conversations as their model sees them, without a generation prompt.

    An unfinished answer at the end has no end mark: the model never gave one.

    Args:
      tokenizer: a transformers tokenizer with chat template and offsets. It encodes the
        conversations side by side on all cores.
      conversations: of each its messages, at least one; any may come first.
      max_tokens: most tokens kept of each, from the front; None: all.
      vocabulary: how many tokens the model knows; None: all of the tokenizer's.

    Returns:
      For every conversation its tokens, or why there are none.
    """
    rendered = [_or_why_not(_render, tokenizer, messages) for messages in conversations]
    encoded = _encode(tokenizer, [text for text in rendered if isinstance(text, str)])
    return [
        _or_why_not(_tokens, tokenizer, messages, text, next(encoded), max_tokens, vocabulary)
        if isinstance(text, str)
        else text
        for messages, text in zip(conversations, rendered, strict=True)
    ]


def stop_clock(template: str) -> str:
    """The template with TODAY for the date, whatever the format it asks for.

    Otherwise tokens, and so scores, would depend on the day on which they are made.
    """
    if _CLOCK not in template:
        return template
    return f"{{%- macro {_CLOCK}(form) %}}{TODAY}{{%- endmacro %}}{template}"


def template_fault(tokenizer: Any, answers: int) -> str | None:
    """Why a plain conversation with so many answers cannot be tokenised; None: it can."""
    plain = [Message(role, "Hello") for role in ("user", "assistant") * answers]
    (made,) = tokenize(tokenizer, [plain], None)
    return str(made) if isinstance(made, TemplateError) else None


def _or_why_not(step: Callable[..., _T], *arguments: Any) -> _T | TemplateError:
    try:
        return step(*arguments)
    except TemplateError as error:
        return error


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[_Encoded]:
    if not texts:
        return iter(())
    # verbose=False: a warning per conversation longer than the model's context says nothing new.
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)


def _tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    encoded: _Encoded,
    max_tokens: int | None,
    vocabulary: int | None,
) -> Tokens:
    all_ids, offsets = encoded
    ids = np.array(all_ids[:max_tokens], np.int32)
    if vocabulary is not None and ids.max(initial=0) >= vocabulary:
        raise TemplateError(f"the model has no token {ids.max()}, which its tokenizer makes of it")
    starts = _first_characters(offsets)
    kept = starts[:max_tokens]
    ends = _ends(tokenizer, messages, text, starts, int(kept.max(initial=0)))
    return Tokens(ids, _roles_at(kept, ends), len(ids) < len(all_ids))


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    if messages[-1].unfinished:
        # Fails where the template changes the text: then it cannot be told where that ended.
        with suppress(TemplateError):
            return _applied(tokenizer, messages, continue_final_message=True)
    return _applied(tokenizer, messages)


def _applied(tokenizer: Any, messages: Sequence[Message], **options: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=False, **options
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
    tokenizer: Any, messages: Sequence[Message], text: str, starts: NDArray[np.intp], reached: int
) -> list[tuple[int, Role]]:
    """Where the template's own front and the messages end in `text`, and whose they are.

    Stops at the first end beyond the character `reached`: a cut conversation of thousands of
    turns would otherwise be rendered thousands of times.
    """
    front = _token_begin(starts, len(_own_front(tokenizer, messages[0])))
    ends, end = [(front, Role.USER)], 0
    for count, message in enumerate(messages, 1):
        end = _end(tokenizer, messages, text, starts, count, end)
        if end < ends[-1][0]:
            raise _unlike(count)
        ends.append((end, _side(message)))
        if end > reached:
            break
    return ends


def _end(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    starts: NDArray[np.intp],
    count: int,
    before: int,
) -> int:
    """Where the first `count` messages end in `text`, if those before the last end at `before`."""
    if count == len(messages):
        return len(text)
    last, alone = messages[count - 1], ""
    for rendered, begin, piece in _renderings(tokenizer, messages, count, before):
        if text.startswith(piece, begin):
            return begin + len(piece)
        alone = rendered
    if last.role == "system":
        return before  # a template may put it elsewhere; all it may be put into is the user's side
    if last.role == "tool" and count <= RENDERED_WHOLE and _is_left_out(tokenizer, messages, count):
        return before  # beyond, the piece that it became is empty, and so has been found
    ends = (_end_of_words(words, alone, text, before) for words in _words(last))
    end = next((each for each in ends if each is not None), None)
    if end is None:
        raise _unlike(count)
    return _token_begin(starts, end)


def _is_left_out(tokenizer: Any, messages: Sequence[Message], count: int) -> bool:
    """Whether the text is the same without message number `count`; its model has not seen it then.

    That it adds nothing when it is last would not do: a template may put it in front of a later
    one, though hardly RENDERED_WHOLE later.
    """
    seen = messages[: 2 * RENDERED_WHOLE]
    with suppress(TemplateError):
        without = _render(tokenizer, [*seen[: count - 1], *seen[count:]])
        return without == _render(tokenizer, seen)
    return False


def _token_begin(starts: NDArray[np.intp], character: int) -> int:
    """Where the token begins that has this character."""
    begun = np.searchsorted(starts, character, side="right")
    return int(starts[begun - 1]) if begun else 0


def _renderings(
    tokenizer: Any, messages: Sequence[Message], count: int, before: int
) -> Iterator[tuple[str, int, str]]:
    """What ends with message number `count`; a piece of it, and where that is in the whole text.

    Up to RENDERED_WHOLE that is all that stands before it. Beyond, it is rendered behind a few
    placeholders with the roles that the template may ask for: those of the first turns and of the
    one before. Pieces that fit together to the whole text, one behind the other, are what the
    messages became.
    """
    if count <= RENDERED_WHOLE:
        whole = _render(tokenizer, messages[:count])
        yield whole, 0, whole
        return
    roles = [message.role for message in messages[: count - 1]]
    for first in range(1, 4):
        placeholders = [Message(role, "?") for role in (*roles[:first], roles[-1])]
        with suppress(TemplateError):
            front = _render(tokenizer, placeholders)
            after = _render(tokenizer, [*placeholders, messages[count - 1]])
            yield after, before, after.removeprefix(front)


def _words(message: Message) -> list[str]:
    """What a template may leave of a message: all, or of an answer what is behind its reasoning."""
    words = [message.content.strip()]
    if _side(message) == Role.ASSISTANT:
        words.append(message.content.rpartition(REASONING_END)[2].strip())
    return words


def _end_of_words(words: str, alone: str, text: str, start: int) -> int | None:
    """Where a turn ends in `text`, from `start` on, that is rendered differently when it is last.

    Templates put a mark behind the last turn only, take an answer's reasoning away once another
    turn follows, or move what the system says. What they put behind the turn's own words they put
    there in both places: as far as text and `alone` agree behind the words, the turn goes. Where
    one begins its next mark like the other, that is within a token, and too far.
    """
    if not words or words not in alone:
        return None
    mark = alone[alone.rindex(words) + len(words) :]
    found = text.find(words, start)
    while found >= 0:
        end = found + len(words)
        agreed = _agreed(mark, text[end : end + len(mark)])
        if agreed:
            return end + agreed
        found = text.find(words, found + 1)
    return None


def _agreed(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _unlike(count: int) -> TemplateError:
    return TemplateError(f"the chat template renders turn {count} differently in context")


def _side(message: Message) -> Role:
    return Role.ASSISTANT if message.role == "assistant" else Role.USER


def _roles_at(starts: NDArray[np.intp], ends: list[tuple[int, Role]]) -> NDArray[np.int8]:
    places = np.array([end for end, _ in ends])
    sides = np.array([side for _, side in ends], np.int8)
    return sides[np.searchsorted(places, starts, side="right")]


def _own_front(tokenizer: Any, first: Message) -> str:
    """What the template puts before a conversation's first message by itself.

    Matters, and is asked for, only where the assistant speaks first: otherwise both are the
    user's side. May go on into the first token behind it.
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
        again = after[_agreed(before, after) :]
        if again and len(again) < len(after) and alone.endswith(again):
            return alone.removesuffix(again)
    raise TemplateError("the chat template renders a first assistant turn unlike a later one")
