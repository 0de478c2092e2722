"""Log lines as a collector reads them: every line one JSON object, whatever happens."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, log_lines, report
from schemas.commit import Commit, Ledger

LEDGER = Ledger(seen=9, scored=6, dead_lettered=2, skipped=1, flagged=1, alerts=1, tokens=900)
COMMIT = Commit(7, "", (), 3, {}, LEDGER, LEDGER + LEDGER, {}, {})


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the process its own logging back; `configure` is for a whole process."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logged = logging.getLogger(log_lines.LOGGER)
    monkeypatch.setattr(logged, "level", logged.level)


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What has been written to stderr since it was last asked for."""
    return lambda: capsys.readouterr().err


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_slice_is_a_sentence_and_its_figures(written: Callable[[], str]) -> None:
    log_lines.configure("json")
    report.slice_done(COMMIT, lag=12_345, seconds=1.5)
    (line,) = objects(written())
    assert line["event"] == "slice_done"
    assert (line["level"], line["logger"]) == ("INFO", "deltawatch")
    assert line["message"].startswith("slice 7: 6 conversations scored, 600 tokens/s")
    expected = {"slice": 7, "seconds": 1.5, "lag": 12_345, "seen": 9, "dead_lettered": 2}
    assert {name: line[name] for name in expected} == expected
    assert line["timestamp"].endswith("+00:00")


def test_for_a_person_an_event_has_its_time_and_other_lines_are_bare(
    written: Callable[[], str],
) -> None:
    log_lines.configure("text")
    report.say("ranges in a/folder")
    report.slice_done(COMMIT, lag=0, seconds=1.5)
    bare, event = written().splitlines()
    assert bare == "ranges in a/folder"
    assert event[8:].startswith(" slice 7: 6 conversations")
    assert event[2] == event[5] == ":"


@pytest.mark.parametrize("form", log_lines.FORMATS)
def test_lines_of_libraries_have_level_and_origin(form: str, written: Callable[[], str]) -> None:
    log_lines.configure(form)
    logging.getLogger("apache_beam.runners").error('it said "no"\nand more')
    logging.getLogger("apache_beam.runners").warning("of no use to anyone")
    text = written()
    if form == "text":
        assert text == 'ERROR apache_beam.runners: it said "no"\nand more\n'
        return
    (line,) = objects(text)
    assert (line["level"], line["logger"]) == ("ERROR", "apache_beam.runners")
    assert line["message"] == 'it said "no"\nand more'


def test_wrong_configuration_is_one_json_line_where_lines_are_json(
    tmp_path: Path, written: Callable[[], str]
) -> None:
    nowhere = [f"--{name}={tmp_path / name}" for name in ("input", "tuned", "directions")]
    made = cli.main(["audit", *nowhere, f"--archive={tmp_path}", "--log-format=json"])
    assert made == 2
    (line,) = objects(written())
    assert line["level"] == "ERROR"
    assert str(tmp_path) in line["message"]


def test_a_crash_is_one_line_with_its_traceback() -> None:
    crash = "from pipeline import log_lines; log_lines.configure('json'); {}['gone']"
    done = subprocess.run([sys.executable, "-c", crash], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    (line,) = objects(done.stderr)
    assert line["level"] == "CRITICAL"
    assert line["exc_info"].endswith("KeyError: 'gone'")
