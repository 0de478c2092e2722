"""Command-line options; every one may also stand in a TOML file given by `--config`.

What a person typed wins over the file, the file over the default. Arguments that deltawatch
does not know are handed to Beam.
"""

import argparse
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline import log_lines, ranges_options, tables
from schemas.errors import ConfigurationError
from schemas.version import TOOL_VERSION
from transforms.ranges.policies import DEFAULT_POLICY, POLICY_NAMES

_DURATION = re.compile(r"(\d+)(ms|s|m|h|d)")
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_REQUIRED = {
    "directions": ("base", "tuned", "out"),
    "calibrate": ("input", "tuned", "directions", "out"),
    "audit": ("input", "tuned", "directions", "archive"),
    "watch": ("input", "tuned", "directions", "state", "archive", "alerts", "dead_letters"),
    "status": ("state",),
    "ranges": (),
    "explain": ("archive",),
    "demo": (),
}


_PER_MODEL = ("tuned", "directions", "ranges", "model_name")
"""What tables of `[[models]]` say in the options' place."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see `{self.prog} --help`")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line.

    Returns:
      The options of the chosen command (`command` names it), and the arguments left for Beam.

    Raises:
      ConfigurationError: something is missing, unknown in the file, or not of its kind.
    """
    parser, commands = _parser()
    known, beam_arguments = parser.parse_known_args(arguments)
    if getattr(known, "config", None):
        commands[known.command].set_defaults(**_from_file(known.config, commands[known.command]))
        known, beam_arguments = parser.parse_known_args(arguments)
    _check(known, beam_arguments)
    return known, beam_arguments


def duration_ms(text: str) -> int:
    """Milliseconds in a duration such as `30s`, `10m` or `1h`."""
    match = _DURATION.fullmatch(text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; write 30s, 10m, 1h")
    return int(match[1]) * _UNIT_MS[match[2]]


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="deltawatch", description="Watch a fine-tuned LLM for what was planted.")
    parser.add_argument("--version", action="version", version=TOOL_VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, text in (
            ("directions", "take the directions of a fine-tuning from its weights"),
            ("calibrate", "make ranges of normal values from a log of normal traffic"),
            ("audit", "judge a finished log"),
            ("watch", "judge a topic as it grows"),
            ("status", "say how far a job has come and what it found"),
            ("ranges", "look at ranges, or change them by hand"),
            ("explain", "make a verdict again from the archive, and say what it rests on"),
            ("demo", "run the whole job here: broker, model, log, planted conversations"),
        )
    }
    _directions_options(made["directions"])
    _demo_options(made["demo"])
    for name in ("calibrate", "audit", "watch"):
        _model_options(made[name])
        _input_options(made[name])
    ranges_options.add(made["ranges"])
    _state_option(made["status"])
    _kafka_option(made["status"])
    _explain_options(made["explain"])
    made["calibrate"].add_argument("--out", type=Path, metavar="RANGES", help="folder to write")
    for name in ("audit", "watch"):
        _judging_options(made[name])
        _output_options(made[name])
    return parser, made


def _directions_options(parser: _Parser) -> None:
    parser.add_argument("--base", type=Path, metavar="DIR", help="the model before fine-tuning")
    _tuned_option(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--top-k", type=_positive, default=20, help="directions per matrix (20)")
    parser.add_argument("--skip-last", type=int, default=3, help="layers not monitored (3)")
    parser.add_argument("--model-name", help="name in alerts and archive (default: the folder's)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep results of matrices there (default: in OUT until done)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="print a table: what was found in every matrix"
    )


def _explain_options(parser: _Parser) -> None:
    parser.add_argument(
        "named", metavar="ID", help="of an alert (its first 8 characters do), or a conversation"
    )
    parser.add_argument("--archive", type=Path, metavar="DIR", help="that of `watch` or `audit`")


def _demo_options(parser: _Parser) -> None:
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder to work in")
    parser.add_argument("--examples", type=Path, default=Path("examples"), help="shipped parts")
    parser.add_argument(
        "--make-ranges", action="store_true", help="make examples/ranges anew instead of the demo"
    )


def _model_options(parser: _Parser) -> None:
    parser.add_argument("--config", type=Path, metavar="TOML", help="file with any of the options")
    parser.add_argument("--base", type=Path, metavar="DIR", help="needed where --tuned is adapter")
    _tuned_option(parser)
    parser.add_argument("--directions", type=Path, metavar="DIR", help="made by `directions`")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--max-tokens", type=_positive, help="cut conversations there")
    parser.add_argument("--batch-tokens", type=_positive, help="of a batch (4096; CPU: 2048)")
    parser.add_argument("--model-name", help="name in alerts and archive")
    parser.add_argument(
        "--log-format", choices=log_lines.FORMATS, default="text", help="of stderr (text)"
    )


def _input_options(parser: _Parser) -> None:
    parser.add_argument(
        "--input", nargs="+", metavar="URI", help="kafka://host:port/topic, or a .jsonl path"
    )
    _kafka_option(parser)
    parser.add_argument("--event-time", metavar="FIELD", help="payload field that dates a record")
    parser.add_argument("--slice-records", type=_positive, default=2000, help="at most (2000)")
    parser.add_argument(
        "--patience", type=duration_ms, default="5m", help="with a broker or disk that fails (5m)"
    )


def _judging_options(parser: _Parser) -> None:
    parser.set_defaults(models=())  # only a file can say it: [[models]]
    parser.add_argument("--ranges", type=Path, metavar="DIR", help="made by `calibrate`")
    parser.add_argument("--policy", choices=POLICY_NAMES, default=DEFAULT_POLICY, help="(budget)")
    parser.add_argument("--rate", type=_share, default=0.01, help="false positives (0.01)")
    parser.add_argument("--percentile", type=float, default=99.9, help="of policy percentile")
    parser.add_argument(
        "--min-calibration", type=_positive, default=1000, help="of range, percentile (1000)"
    )
    parser.add_argument("--epoch", type=duration_ms, default="10m", help="length (10m)")
    parser.add_argument(
        "--keep", type=_days, default=30, help="how long conversations stay in the ranges (30d)"
    )
    parser.add_argument("--idle", type=duration_ms, default="30s", help="silent partition (30s)")


def _output_options(parser: _Parser) -> None:
    _state_option(parser)
    parser.add_argument("--archive", type=Path, metavar="DIR", help="Parquet tables")
    parser.add_argument("--alerts", metavar="URI", help="kafka://host:port/topic, or a .jsonl path")
    parser.add_argument("--dead-letters", metavar="URI", help="likewise")
    parser.add_argument(
        "--excerpt-tokens", type=int, default=0, help="of text around a peak in alerts (0: none)"
    )
    parser.add_argument("--metrics-port", type=_port, help="of /metrics, /healthz and /readyz")


def _tuned_option(parser: _Parser) -> None:
    parser.add_argument(
        "--tuned", type=Path, nargs="+", metavar="DIR", help="checkpoint, or PEFT adapter(s)"
    )


def _kafka_option(parser: _Parser) -> None:
    parser.add_argument(
        "--kafka-properties", type=Path, metavar="FILE", help="TLS and SASL of all topics' brokers"
    )


def _state_option(parser: _Parser) -> None:
    parser.add_argument("--state", type=Path, metavar="DIR", help="plans and commits")


def _from_file(path: Path, parser: _Parser) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"cannot read --config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path} is not TOML: {error}") from None
    actions = {action.dest: action for action in parser._actions}
    named = {name.replace("-", "_"): value for name, value in values.items()}
    several = {}
    if "models" in named and parser.get_default("models") is not None:
        several["models"] = tables.parse(named.pop("models"), path)
    unknown = sorted(named.keys() - actions.keys())
    if unknown:
        raise ConfigurationError(f"--config {path}: {unknown[0]!r} is no option of this command")
    return {name: _typed(actions[name], value, path) for name, value in named.items()} | several


def _typed(action: argparse.Action, value: Any, path: Path) -> Any:
    """A value from the file, checked as one from the command line would be."""
    several = action.nargs == "+"
    if isinstance(value, list) and not several:
        raise ConfigurationError(f"--config {path}: {action.dest} is not of the right kind")
    convert = action.type if callable(action.type) else str
    try:
        typed = [convert(str(item)) for item in (value if isinstance(value, list) else [value])]
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ConfigurationError(f"--config {path}: {action.dest}: {error}") from None
    if action.choices and typed[0] not in action.choices:
        raise ConfigurationError(f"--config {path}: {action.dest} is one of {action.choices}")
    return typed if several else typed[0]


def _check(known: argparse.Namespace, beam_arguments: list[str]) -> None:
    required = _REQUIRED[known.command]
    if getattr(known, "models", ()):
        _check_beside_models(known)
        required = tuple(name for name in required if name not in _PER_MODEL)
    missing = [name for name in required if not getattr(known, name)]
    if missing:
        option = missing[0].replace("_", "-")
        raise ConfigurationError(f"--{option} is needed; see `deltawatch {known.command} --help`")
    without_beam = ("directions", "status", "ranges", "explain", "demo")
    if known.command in without_beam and beam_arguments:
        raise ConfigurationError(f"unknown argument {beam_arguments[0]!r}")
    if any("direct_num_workers" in argument for argument in beam_arguments):
        raise ConfigurationError(
            "--direct_num_workers loses records in Beam 2.77; leave it out (see docs/operations.md)"
        )


def _check_beside_models(known: argparse.Namespace) -> None:
    for name in _PER_MODEL:
        if getattr(known, name) is not None:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} cannot be given beside [[models]], whose tables say "
                f"it; leave one of the two out"
            )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _days(text: str) -> int:
    days, rest = divmod(duration_ms(text), _UNIT_MS["d"])
    if rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days; write 30d")
    return days


def _port(text: str) -> int:
    number = _positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return number


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 0.5")
    return value
