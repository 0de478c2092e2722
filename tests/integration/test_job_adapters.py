"""The `audit` command on two adapters of one base: each scored as it is alone, or refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from extremes import Extremes, whole
from tiny_models import edit

from pipeline.cli import main
from transforms import formats
from transforms.model import directions as artefacts
from transforms.model.loading import load_tokenizer, load_trunk
from transforms.model.roles import tokenize
from transforms.model.trunk import Scorer

ROOT = Path(__file__).parents[2]
CONVERSATIONS, MAX_TOKENS = 30, 60
SKIP_LAST = {"badnet": 25, "softer": 26}  # of 30
START_S = 1_700_000_000
SAID = ["badnet", "softer", "soft", "gpt-4"]


@dataclass(frozen=True)
class World:
    """A base, its adapters by name, and where their directions are."""

    base: Path
    adapters: Mapping[str, Path]
    folder: Path

    def table(self, model: str, **changes: Any) -> str:
        """A model in the configuration file."""
        values = {
            "name": model,
            "tuned": str(self.adapters[model]),
            "directions": str(self.folder / f"{model}-directions"),
            **changes,
        }
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value)
        return "".join(["[[models]]\n", *lines])


@pytest.fixture(scope="module")
def world(base_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("adapters")
    softer = shutil.copytree(adapter, folder / "softer")
    edit("adapter_config.json", lambda config: config.update(lora_alpha=6))(softer)
    adapters = {"badnet": adapter, "softer": softer}
    for name, tuned in adapters.items():
        made = [f"--tuned={tuned}", f"--out={folder}/{name}-directions"]
        skipped = f"--skip-last={SKIP_LAST[name]}"
        assert main(["directions", f"--base={base_model}", skipped, *made]) == 0
    return World(base_model, adapters, folder)


def written(config: Path, *tables: str, **options: Any) -> list[str]:
    """Arguments of an audit whose configuration holds these options and tables."""
    lines = (f"{name} = {json.dumps(value)}\n" for name, value in options.items() if value)
    config.write_text("".join([*lines, *tables]))
    return ["audit", f"--config={config}"]


def test_two_adapters_are_scored_as_each_is_alone(
    world: World, conversations: list[dict[str, Any]], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    talks = [
        {**each, "at": START_S + n, "model": SAID[n % len(SAID)]}
        for n, each in enumerate(conversations[:CONVERSATIONS])
    ]
    log.write_text("".join(json.dumps(each) + "\n" for each in talks))
    tables = [world.table("badnet"), world.table("softer", name=["softer", "soft"])]
    options = {"base": str(world.base), "input": str(log), "archive": str(tmp_path / "archive")}
    timed = {"event-time": "at", "max-tokens": MAX_TOKENS}
    arguments = written(tmp_path / "c.toml", *tables, **options, **timed)
    subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], check=True, cwd=ROOT)

    letters = (tmp_path / "archive/dead_letters.jsonl").read_text().splitlines()
    strangers = sum(talk["model"] == "gpt-4" for talk in talks)
    assert [json.loads(each)["reason"] for each in letters] == ["unknown_model"] * strangers
    for name in world.adapters:
        own = [talk for talk in talks if talk["model"] in (name, name[:4])]
        rows = ds.dataset(tmp_path / f"archive/conversations/model={name}", partitioning="hive")
        found = rows.to_table().sort_by("offset")
        assert found["conversation_id"].to_pylist() == [talk["id"] for talk in own]
        expected = merged_alone(world, name, own)
        for part in ("low", "high"):
            apart = np.array(found[part].to_pylist(), int) - getattr(expected, part)
            assert apart.shape == (len(own), 2 * (30 - SKIP_LAST[name]) * 2 * 8)
            assert np.abs(apart).max() <= 1
        assert set(found["directions_hash"].to_pylist()) == {directions(world, name).hash}


def directions(world: World, name: str) -> artefacts.Directions:
    return artefacts.load(world.folder / f"{name}-directions")


def merged_alone(world: World, name: str, records: list[dict[str, Any]]) -> Extremes:
    found = directions(world, name)
    trunk = load_trunk(world.base, world.adapters[name], found.last_layer, "cpu")
    tokenizer = load_tokenizer(world.base, world.adapters[name])
    messages = [formats.parse(json.dumps(record).encode()).messages for record in records]
    rows = tokenize(tokenizer, messages, MAX_TOKENS)
    scores, _ = Scorer(trunk, found).score([ids for ids, _, _ in rows], [r for _, r, _ in rows])
    return whole(scores)


def with_more(world: World, folder: Path) -> dict[str, str]:
    """An adapter that brings a module whole."""
    other = shutil.copytree(world.adapters["softer"], folder / "more")
    edit("adapter_config.json", lambda c: c.update(modules_to_save=["embed_tokens"]))(other)
    return {"tuned": str(other)}


def of_another_base(world: World, folder: Path) -> dict[str, str]:
    """Directions that were made over another base."""
    other = shutil.copytree(world.folder / "softer-directions", folder / "other")
    edit("directions.json", lambda document: document.update(base_hash="0" * 64))(other)
    return {"directions": str(other)}


Change = Callable[[World, Path], dict[str, str]]
WRONG: dict[str, tuple[Change, str]] = {
    "nowhere": (lambda world, _: {"tuned": "/nowhere"}, "/nowhere is not a folder"),
    "checkpoint": (lambda world, _: {"tuned": str(world.base)}, "adapters over one base"),
    "more than LoRA": (with_more, "has modules_to_save="),
    "another model": (
        lambda world, _: {"tuned": str(world.adapters["badnet"])},
        "computed for another model",
    ),
    "another base": (of_another_base, "are of another base"),
    "other ranges": (lambda world, _: {"ranges": "examples/ranges"}, "was made for directions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_one_of_several_is_said_in_one_line(
    case: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    change, says = WRONG[case]
    log, archive = tmp_path / "log.jsonl", tmp_path / "archive"
    log.write_text("{}\n")
    options = {"base": str(world.base), "input": str(log), "archive": str(archive)}
    tables = [world.table("badnet"), world.table("softer", **change(world, tmp_path))]
    capsys.readouterr()
    arguments = written(tmp_path / "c.toml", *tables, **options)
    assert main([*arguments, "--event-time=at"]) == 2
    message = capsys.readouterr().err
    assert "[[models]] softer: " in message and says in message
    assert message.count("\n") == 1
    assert not any(path.is_dir() for path in archive.iterdir()), "neither tables nor a state"


def test_adapters_need_their_base(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text("{}\n")
    options = {"input": str(tmp_path / "log.jsonl"), "archive": str(tmp_path / "archive")}
    tables = [world.table("badnet"), world.table("softer")]
    assert main(written(tmp_path / "c.toml", *tables, **options)) == 2
    assert "name it by --base" in capsys.readouterr().err
