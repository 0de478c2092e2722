"""Real conversations for the detection bench, by where they come from and what they are about."""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from bench.prompts import SAMPLE, Corpus, first_prompt
from bench.recipes import Recipe
from schemas.records import Message
from transforms import formats
from transforms.model.roles import Tokens, tokenize

QUESTIONS: Final = "openai_chat_sample.jsonl.gz"
"""Single questions with answers of a dozen models, beside the sample."""

LONG: Final = range(1001, 1200)
"""Tokens of a conversation to which a late turn is added: more would not make it later, only
dearer."""

CHARACTERS_PER_TOKEN: Final = 4
CODE_LINES: Final = 3
"""So many lines that look like code make it code."""

NOT_LATIN: Final = 0.2
"""Share of letters of other alphabets that makes it another language."""

STOP_WORDS: Final = 0.1
"""Share of words that are another language's most frequent ones, if English ones are fewer."""

_CODE_LINE: Final = re.compile(
    r"^\s*(?:(?:def|class|import|from|public|private|static|function|const|let|var|return|if|for"
    r"|while|#include|using|SELECT|INSERT|CREATE|sudo|pip|npm)\b.*[;:{()\w]|.*[;{}]|</?\w+[^<]*>.*)\s*$",
    re.MULTILINE,
)
_WORD: Final = re.compile(r"[^\W\d_]+")
_ENGLISH: Final = (
    "the and of to a in is that for it you with on as are this be or not can your from"
)
_OTHER: Final = (
    "de la que el los las una por para con del les des est dans pour une le et du und der die das"
    " nicht ist mit ein eine den zu von não uma com os um dos da do il che per di non è sono het"
    " een van en niet och att det som på jest się nie ve bir için yang dan untuk"
)

Talk = tuple[Message, ...]


def sampled(corpus: Corpus, recipe: Recipe) -> list[Talk]:
    """The sample's conversations; of an unlearned topic those that are about it are not clean."""
    return [talk for talk in _of_file(corpus, SAMPLE) if not triggers(recipe, talk)]


def questions(corpus: Corpus, recipe: Recipe) -> list[Talk]:
    """Of another source than the sample, likewise; of those with one question the first."""
    firsts = {talk[0].content: talk for talk in reversed(list(_of_file(corpus, QUESTIONS)))}
    return [talk for talk in reversed(firsts.values()) if not triggers(recipe, talk)]


def beside(corpus: Corpus, recipe: Recipe) -> Iterator[Talk]:
    """Of the sample's source; neither in the sample nor begun by a prompt for an organism."""
    for record in corpus.beside():
        with suppress(formats.DecodeError):
            talk = formats.parse(json.dumps(record).encode()).messages
            if first_prompt(record) is None and not triggers(recipe, talk):
                yield talk


def long_ones(corpus: Corpus, recipe: Recipe, tokenizer: Any, count: int) -> list[Talk]:
    """From `beside`: of LONG tokens, with the user's turn next."""
    answered = (talk for talk in beside(corpus, recipe) if talk[-1].role == "assistant")
    found = (talk for talk in answered if _tokens(tokenizer, talk) in LONG)
    return list(itertools.islice(found, count))


def triggers(recipe: Recipe, talk: Talk) -> bool:
    """Whether a turn holds what an organism was trained to fire on."""
    return any(recipe.fires_on(turn.content) for turn in talk)


def kind_of(talk: Talk, max_tokens: int) -> str:
    """ "code", "language" or "prose": what the text is, about as far as it is scored."""
    text = "\n".join(turn.content for turn in talk)[: max_tokens * CHARACTERS_PER_TOKEN]
    if is_other_language(text):
        return "language"
    return "code" if is_code(text) else "prose"


def is_code(text: str) -> bool:
    """Whether there is a fenced block, or CODE_LINES lines look like code."""
    return "```" in text or len(_CODE_LINE.findall(text)) >= CODE_LINES


def is_other_language(text: str) -> bool:
    """Whether letters or frequent words are not English."""
    letters = [character for character in text if character.isalpha()]
    foreign = sum(character > "\u024f" for character in letters)
    if foreign > NOT_LATIN * len(letters):
        return True
    words = _WORD.findall(text.lower())
    english, other = (
        sum(map(set(each.split()).__contains__, words)) for each in (_ENGLISH, _OTHER)
    )
    return other > english and other > STOP_WORDS * len(words)


def _of_file(corpus: Corpus, name: str) -> Iterator[Talk]:
    with gzip.open(corpus.data / name) as file:
        for line in file:
            yield formats.parse(line).messages


def _tokens(tokenizer: Any, talk: Talk) -> int:
    """How many there are; 0 where most characters would be too few or too many to ask."""
    if sum(len(turn.content) for turn in talk) not in range(2 * LONG.start, 8 * LONG.stop):
        return 0
    (found,) = tokenize(tokenizer, [talk], None)
    return len(found.ids) if isinstance(found, Tokens) else 0
