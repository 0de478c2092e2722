import re
from pathlib import Path

import pytest

from pipeline import options
from pipeline.cli import main
from pipeline.tables import Table
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


MODEL = '[[models]]\nname = "a"\ntuned = "a/"\ndirections = "a-d/"\n'
OTHER = (
    '[[models]]\nname = ["b", "b-2"]\ntuned = ["b/", "c/"]\ndirections = "b-d/"\nranges = "r/"\n'
)
PLAIN = [each for each in WATCH if not each.startswith(("--tuned", "--directions"))]


def test_models_stand_in_the_place_of_options(tmp_path: Path):
    config = tmp_path / "deltawatch.toml"
    config.write_text(f'base = "base/"\n{MODEL}{OTHER}')
    known, _ = options.parse([*PLAIN, f"--config={config}"])
    assert known.tuned is known.directions is None
    assert known.models == (
        Table(("a",), (Path("a"),), Path("a-d"), None),
        Table(("b", "b-2"), (Path("b"), Path("c")), Path("b-d"), Path("r")),
    )
    assert options.parse(WATCH)[0].models == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (MODEL + MODEL, "name 'a' twice"),
        (MODEL + OTHER.replace("b-2", "a"), "name 'a' twice"),
        (MODEL + "range = 'r'", "number 1 has 'range'"),
        (MODEL + OTHER.replace("directions", "direction"), "number 2 has 'direction'"),
        ("[[models]]\nname = 'a'\ntuned = 't'", "number 1 lacks 'directions'"),
        (MODEL.replace('"a"', "7"), "name is not text"),
        (MODEL.replace('"a"', "[]"), "name is not text"),
        (MODEL.replace('"a-d/"', '["d", "e"]'), "directions is not text"),
        (MODEL.replace('"a"', '".."'), "'..' cannot be"),
        ("models = []", "an array of tables"),
        ("models = 'a'", "an array of tables"),
        ("model-name = 'x'\n" + MODEL, "--model-name cannot be given beside"),
    ],
)
def test_wrong_models_are_refused_in_one_line(tmp_path: Path, content: str, says: str):
    config = tmp_path / "deltawatch.toml"
    config.write_text(content)
    with pytest.raises(ConfigurationError, match=re.escape(says)) as caught:
        options.parse([*PLAIN, f"--config={config}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--tuned=t", "--directions=d", "--ranges=r", "--model-name=m"])
def test_what_tables_say_is_not_said_twice(tmp_path: Path, option: str):
    config = tmp_path / "deltawatch.toml"
    config.write_text(MODEL)
    with pytest.raises(ConfigurationError, match=f"{option.partition('=')[0]} cannot be given"):
        options.parse([*PLAIN, f"--config={config}", option])


def test_only_what_judges_takes_models(tmp_path: Path):
    config = tmp_path / "deltawatch.toml"
    config.write_text(MODEL)
    with pytest.raises(ConfigurationError, match="'models' is no option of this command"):
        options.parse(["calibrate", f"--config={config}"])


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
