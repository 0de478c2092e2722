"""Wrong configuration stops a command before it starts: exit 2, one line that says what to do."""

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.cli import main
from pipeline.demo.broker import Broker
from pipeline.state import State

RANGES = Path(__file__).parents[2] / "examples/ranges"
LOGGED = "log-of-configuration"


@pytest.fixture(scope="module")
def watch(
    broker: Broker,
    base_model: Path,
    adapter: Path,
    directions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Options of a `watch` that has nothing wrong."""
    out = tmp_path_factory.mktemp("watch")
    for topic in (LOGGED, f"{LOGGED}-alerts", f"{LOGGED}-dead"):
        broker.create_topic(topic)
    return {
        "base": str(base_model),
        "tuned": str(adapter),
        "directions": str(directions),
        "ranges": str(RANGES),
        "max-tokens": "160",
        "input": f"kafka://{broker.bootstrap}/{LOGGED}",
        "alerts": f"kafka://{broker.bootstrap}/{LOGGED}-alerts",
        "dead-letters": f"kafka://{broker.bootstrap}/{LOGGED}-dead",
        "archive": str(out / "archive"),
        "state": str(out / "state"),
    }


def refused(
    options: dict[str, str], capsys: pytest.CaptureFixture[str], command: str = "watch"
) -> str:
    """The one line in which a command refuses its options."""
    capsys.readouterr()
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert main([command, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("deltawatch: ")
    assert message.count("\n") == 1
    assert "state" not in options or not (Path(options["state"]) / "plan.json").exists()
    return message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": "/nowhere"}, "--base /nowhere is not a folder; give"),
        ({"tuned": "/nowhere"}, "--tuned /nowhere is not a folder; give"),
        ({"directions": "/nowhere"}, "--directions /nowhere is not a folder; give"),
        ({"ranges": "/nowhere"}, "make one with `calibrate`"),
        ({"max-tokens": "200"}, "was calibrated with --max-tokens 160"),
        ({"max-tokens": "9000"}, "more than the model's context; give at most 8192"),
        ({"archive": "/proc/archive"}, "cannot write to --archive /proc/archive"),
        ({"state": "/proc/state"}, "give --state a writable folder"),
        ({"alerts": "/proc/alerts.jsonl"}, "cannot write to '/proc/alerts.jsonl'"),
        ({"alerts": "alerts.txt"}, "neither a topic nor a .jsonl file"),
        ({"input": "log.jsonl"}, "use audit for a finished log"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"dtype": "int3"}, "--dtype int3"),
    ],
)
def test_wrong_options_of_watch(
    change: dict[str, str], says: str, watch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused({**watch, **change}, capsys)


@pytest.mark.parametrize("option", ["input", "alerts", "dead-letters"])
def test_no_such_topic_and_no_such_broker(
    option: str, watch: dict[str, str], closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = watch[option] + "-misspelt"
    assert "create it or correct the name" in refused({**watch, option: elsewhere}, capsys)
    nowhere = f"kafka://127.0.0.1:{closed_port}/log"
    assert "start it or correct the address" in refused({**watch, option: nowhere}, capsys)


def test_directions_of_another_model(
    watch: dict[str, str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    message = refused({**watch, "tuned": str(other)}, capsys)
    assert "computed for another model" in message
    assert "run `deltawatch directions`" in message


def test_ranges_of_other_directions(
    watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "fewer"
    made = ["directions", "--top-k=3", f"--base={watch['base']}", f"--tuned={watch['tuned']}"]
    assert main([*made, f"--out={fewer}"]) == 0
    message = refused({**watch, "directions": str(fewer)}, capsys)
    assert "was made for directions" in message
    assert "calibrate anew" in message


def test_an_adapter_of_another_base(
    watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=4,
        vocab_size=50,
    )
    LlamaForCausalLM(tiny).save_pretrained(tmp_path / "tiny")
    options = {
        "base": str(tmp_path / "tiny"),
        "tuned": watch["tuned"],
        "out": str(tmp_path / "out"),
    }
    assert "was made for another base" in refused(options, capsys, "directions")


def test_files_without_times_need_ranges(
    watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text("{}\n")
    options = {name: value for name, value in watch.items() if name != "ranges"}
    message = refused({**options, "input": str(tmp_path / "log.jsonl")}, capsys, "audit")
    assert "give --ranges" in message
    missing = {**watch, "input": str(tmp_path / "none*.jsonl")}
    assert "no file at" in refused(missing, capsys, "audit")


@pytest.mark.parametrize("damage", ["cut", "garbled", "not gzip"])
def test_a_broken_gzip_file_is_found_before_the_run(
    damage: str, watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress(b'{"messages": []}\n' * 1000 + random.Random(1).randbytes(4000))
    broken = {"cut": whole[:-2000], "garbled": whole[:500] + b"x" * 500, "not gzip": b"{}\n"}
    (tmp_path / "log.jsonl.gz").write_bytes(broken[damage])
    message = refused({**watch, "input": str(tmp_path / "log.jsonl.gz")}, capsys, "audit")
    assert "log.jsonl.gz is not a whole gzip file" in message


def test_a_log_that_cannot_be_opened(
    watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    log.symlink_to("/proc/sys/vm/compact_memory")  # can only be written, by root too
    message = refused({**watch, "input": str(log)}, capsys, "audit")
    assert "log.jsonl (Permission denied)" in message


@pytest.mark.parametrize("option", ["alerts", "dead-letters"])
def test_an_output_that_is_an_input_would_feed_itself(
    option: str, watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused({**watch, option: watch["input"].replace("127.0.0.1", "localhost")}, capsys)
    assert f"/{LOGGED} is an --input too" in message
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    written = str(tmp_path / "." / "log.jsonl")
    assert "is an --input too" in refused(
        {**watch, "input": str(log), option: written}, capsys, "audit"
    )


def test_a_log_that_is_named_twice(
    watch: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--input", f"{watch['input']}?start=0&end=5", f"{watch['input']}?start=7&end=9"]
    options = [f"--{name}={value}" for name, value in watch.items() if name != "input"]
    capsys.readouterr()
    assert main(["audit", *options, *parts]) == 2
    assert "are the same log; give one" in capsys.readouterr().err


def test_a_state_directory_has_one_process(
    watch: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = State(tmp_path / "held")
    message = refused({**watch, "state": str(tmp_path / "held")}, capsys)
    held.close()
    assert "is in use by another deltawatch" in message
