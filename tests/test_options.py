from pathlib import Path

import pytest

from pipeline import options
from pipeline.cli import main
from schemas.errors import ConfigurationError

WATCH = [
    "watch",
    "--input",
    "kafka://h:9092/log",
    "--tuned=t",
    "--directions=d",
    "--state=s",
    "--archive=a",
    "--alerts=kafka://h:9092/alerts",
    "--dead-letters=dead.jsonl",
]


def test_defaults_are_those_of_the_documentation():
    known, rest = options.parse(WATCH)
    assert (known.epoch, known.idle, known.policy, known.rate) == (600_000, 30_000, "budget", 0.01)
    assert rest == []


def test_file_gives_what_the_command_line_leaves_out(tmp_path: Path):
    config = tmp_path / "deltawatch.toml"
    config.write_text('rate = 0.002\nepoch = "30s"\nmax-tokens = 160\ninput = ["x.jsonl"]\n')
    known, _ = options.parse([*WATCH, f"--config={config}", "--epoch=1h"])
    assert (known.rate, known.epoch, known.max_tokens) == (0.002, 3_600_000, 160)
    assert known.input == ["kafka://h:9092/log"]


def test_required_options_may_stand_in_the_file(tmp_path: Path):
    config = tmp_path / "deltawatch.toml"
    config.write_text('input = ["x.jsonl"]\ntuned = "t"\ndirections = "d"\narchive = "a"\n')
    known, _ = options.parse(["audit", f"--config={config}"])
    assert (known.input, known.archive) == (["x.jsonl"], Path("a"))


def test_one_value_in_the_file_may_stand_for_a_list_of_one(tmp_path: Path):
    config = tmp_path / "deltawatch.toml"
    config.write_text('input = "x.jsonl"\ntuned = ["a", "b"]\ndirections = "d"\narchive = "a"\n')
    known, _ = options.parse(["audit", f"--config={config}"])
    assert (known.input, known.tuned) == (["x.jsonl"], [Path("a"), Path("b")])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no-such-option = 1", "no_such_option"),
        ("rate = 'high'", "rate"),
        ("rate = [0.1]", "rate"),
        ("policy = 'best'", "policy"),
        ("rate = ", "not TOML"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, content: str, says: str):
    config = tmp_path / "deltawatch.toml"
    config.write_text(content)
    with pytest.raises(ConfigurationError, match=says) as caught:
        options.parse([*WATCH, f"--config={config}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["audit"], "--input is needed"),
        (["audit", "--epoch=soon"], "30s"),
        (["audit", "--rate=2"], "0.5"),
        ([*WATCH, "--direct_num_workers=2"], "direct_num_workers"),
        (["directions", "--base=b", "--tuned=t", "--out=o", "--extra"], "--extra"),
        (["nothing"], "invalid choice"),
    ],
)
def test_wrong_command_lines_exit_with_2_and_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "ms"), [("250ms", 250), ("30s", 30_000), ("10m", 600_000), ("1d", 86_400_000)]
)
def test_durations(text: str, ms: int):
    assert options.duration_ms(text) == ms
