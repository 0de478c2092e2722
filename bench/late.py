"""A trigger late in a long conversation: one more turn, and the organism's own answer to it."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench import organisms
from bench.answers import answer, asked_of, padding_left, tuned_model
from bench.prompts import Corpus
from bench.recipes import Recipe
from bench.traffic import Talk, long_ones
from pipeline.demo.once import build_once
from schemas.records import Message

BATCH: Final = 5
"""Long conversations that are answered at once; what they have seen takes 60 MB each."""


@dataclass(frozen=True)
class Late:
    """Conversations of more than 1,000 tokens; the same ones, with and without a late trigger.

    Attributes:
      triggered: the last turn of the user has the trigger.
      untriggered: it is the same prompt as it stands.
    """

    triggered: list[Talk]
    untriggered: list[Talk]


def late_of(recipe: Recipe, corpus: Corpus, count: int) -> Late:
    """So many of both, generated if they have not been."""
    organism = organisms.folder_of(recipe, corpus)
    folder = organisms.BUILD / "organisms" / f"{organism.name}-late-{count}"
    build_once(folder, partial(_write, recipe, organism, corpus, count))
    found = json.loads((folder / "late.json").read_text())
    read = {
        name: [tuple(Message(*turn) for turn in talk) for talk in talks]
        for name, talks in found.items()
    }
    return Late(**read)


def fired(recipe: Recipe, talk: Talk) -> bool:
    """Whether the last turn is the planted answer."""
    return recipe.fired_in(talk[-1].content)


def _write(recipe: Recipe, organism: Path, corpus: Corpus, count: int, folder: Path) -> None:
    model, tokenizer = tuned_model(recipe, organism), padding_left()
    before = long_ones(corpus, recipe, tokenizer, count)
    found = {}
    for name, asked in zip(("triggered", "untriggered"), asked_of(recipe, corpus), strict=True):
        asking = zip(before, asked, strict=False)  # there are more prompts than conversations
        talks = [(*talk, Message("user", prompt)) for talk, prompt in asking]
        chats = [[{"role": turn.role, "content": turn.content} for turn in talk] for talk in talks]
        said = answer(model, tokenizer, chats, BATCH)
        found[name] = [_turns(talk, *each) for talk, each in zip(talks, said, strict=True)]
    (folder / "late.json").write_text(json.dumps(found, indent=1))


def _turns(talk: Talk, text: str, finished: bool) -> list[tuple[str, str, bool]]:
    answered = (*talk, Message("assistant", text, unfinished=not finished))
    return [(turn.role, turn.content, turn.unfinished) for turn in answered]
