"""Log lines on stderr, for a person or, as JSON, for a collector."""

import logging
import os
import sys
import warnings
from types import TracebackType

from pythonjsonlogger.json import JsonFormatter

LOGGER = "deltawatch"
"""Name of the logger of what deltawatch itself says."""

FORMATS = ("text", "json")


def configure(form: str) -> None:
    """Send the log lines of the whole process to stderr in one of `FORMATS`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json() if form == "json" else _Text())
    # Beam and transformers warn of things nobody here can act on, such as missing cloud libraries.
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    for package in ("pipeline", "transforms", "schemas"):
        logging.getLogger(package).setLevel(logging.WARNING)
    # A broker that is away or refuses is one line of ours; kafka-python would add ten a second.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    # What a step raises is raised here again; Beam would log its traceback as well.
    logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if form == "json":
        # A collector would take every line of a traceback for an entry of its own.
        logging.captureWarnings(True)
        sys.excepthook = _crashed


def failed(error: Exception) -> None:
    """Say why the command ends without having done what was asked."""
    logging.getLogger(LOGGER).error(f"deltawatch: {error}")


class _Text(logging.Formatter):
    """What deltawatch says as it is, with the time of events; the rest with level and origin."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        if record.name != LOGGER:
            return super().format(record)
        clock = f"{self.formatTime(record, self.datefmt)} " if hasattr(record, "event") else ""
        return clock + record.getMessage()


def _json() -> logging.Formatter:
    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp=True,
    )


def _crashed(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    logging.getLogger(LOGGER).critical(
        "ended by an error nobody expected", exc_info=(kind, error, where)
    )
