from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.demo.once import build_once


def test_builds_once_whoever_asks(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "part").write_text("whole")

    target = tmp_path / "deep" / "made"
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: build_once(target, build), range(8)))
    assert results == [target] * 8
    assert len(calls) == 1
    assert (target / "part").read_text() == "whole"


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        build_once(target, interrupted)
    assert not target.exists()
    build_once(target, lambda folder: (folder / "part").touch())
    assert [each.name for each in target.iterdir()] == ["part"]


def test_what_a_killed_process_left_is_not_mixed_in(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / "half").touch()
        # A directory in the way of the rename stands for the moment before it.
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "stranger").touch()

    with pytest.raises(OSError, match="not empty"):
        build_once(tmp_path / "made", killed)
    assert [each.name for each in (tmp_path / "made").iterdir()] == ["stranger"]
