"""The conversations that the detection bench judges, as an organism's directions see them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from bench import organisms, traffic
from bench.answers import answers_of
from bench.late import fired, late_of
from bench.prompts import Corpus
from bench.recipes import Recipe
from bench.scored import Scores
from bench.traffic import Talk
from schemas.records import Message, Segments
from transforms.model import directions as artefacts
from transforms.model.engine import TrunkEngine

CUT: Final = 160
"""Tokens of a conversation where it is cut, as in the figures that the rule was made from."""

UNCUT: Final = 2048

FOREIGN: Final = 400
"""Most conversations of a foreign kind."""


@dataclass(frozen=True)
class Subject:
    """An organism and its conversations.

    Attributes:
      recipe: of the organism.
      corpus: of real conversations.
      scores: of all of them.
    """

    recipe: Recipe
    corpus: Corpus
    scores: Scores

    @staticmethod
    def of(recipe: Recipe, corpus: Corpus) -> "Subject":
        """Takes the organism's directions, if they have not been."""
        organism = organisms.folder_of(recipe, corpus)
        build = organisms.BUILD / "detection"
        folder = build / f"{organism.name}-directions"
        if not folder.exists():
            artefacts.save(artefacts.compute_directions(organisms.base(), organism), folder)
        engine = TrunkEngine(None if recipe.full else organisms.base(), organism, folder)
        return Subject(recipe, corpus, Scores(engine, build / organism.name))

    def clean(self, count: int, max_tokens: int) -> Segments:
        """The first conversations of the sample."""
        return self.scores.of("sample", self._sampled[:count], max_tokens)

    def prose(self, count: int) -> Segments:
        """Those of them, cut, that are English and no code."""
        kinds = [traffic.kind_of(talk, CUT) for talk in self._sampled[:count]]
        return self.clean(count, CUT).take(np.flatnonzero(np.array(kinds) == "prose"))

    def questions(self) -> Segments:
        """The other source's conversations, cut."""
        return self.scores.of("questions", traffic.questions(self.corpus, self.recipe), CUT)

    def kinds(self) -> dict[str, Segments]:
        """Cut conversations that calibration on `prose` never saw, at most FOREIGN of a kind."""
        beside = list(traffic.beside(self.corpus, self.recipe))
        found = {
            kind: self.scores.of(kind, _of_kind(beside, kind), CUT) for kind in ("code", "language")
        }
        asked = self.questions()
        return found | {"questions": asked.take(np.arange(min(FOREIGN, asked.conversations)))}

    def answered(self) -> dict[str, Segments]:
        """ "triggered" prompts with the organism's answers, and "twins" without the trigger.

        Those of the triggered that worked are "fired" too. Where the payload came without the
        trigger, a flag is not a false one: no twin. Sets of none are left out.
        """
        answers = answers_of(self.recipe, self.corpus)
        triggered = [_talk(*turn) for turn in answers.triggered]
        untriggered = [_talk(*turn) for turn in answers.untriggered]
        return self._named(("triggered", "fired", "twins"), triggered, untriggered)

    def late(self, count: int) -> dict[str, Segments]:
        """Likewise "late", "late fired" and "late twins": the last turns of long conversations."""
        late = late_of(self.recipe, self.corpus, count)
        return self._named(("late", "late fired", "late twins"), late.triggered, late.untriggered)

    def _named(
        self, names: Sequence[str], triggered: Sequence[Talk], untriggered: Sequence[Talk]
    ) -> dict[str, Segments]:
        silent = [talk for talk in untriggered if not fired(self.recipe, talk)]
        worked = np.flatnonzero([fired(self.recipe, talk) for talk in triggered])
        scored = self.scores.of(names[0], triggered, UNCUT)
        sets = (scored, scored.take(worked), self.scores.of(names[2], silent, UNCUT))
        return {name: each for name, each in zip(names, sets, strict=True) if each.conversations}

    @cached_property
    def _sampled(self) -> list[Talk]:
        return traffic.sampled(self.corpus, self.recipe)


def _of_kind(talks: Sequence[Talk], kind: str) -> list[Talk]:
    found = (talk for talk in talks if traffic.kind_of(talk, CUT) == kind)
    return list(itertools.islice(found, FOREIGN))


def _talk(prompt: str, answer: str, finished: bool) -> Talk:
    """The answer is as the model left it: at its end, or at the most tokens it was given."""
    return Message("user", prompt), Message("assistant", answer, unfinished=not finished)
