"""The `deltawatch` command: options in, exit status out.

Exit status: 0 done, 1 the run failed or its counts do not add up, 2 wrong use or configuration.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from pipeline import options
from schemas.errors import ConfigurationError, RunFailedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned, messages go to stderr."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is what is on disk, never a download
    _configure_logging()
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except ConfigurationError as error:
        print(f"deltawatch: {error}", file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(f"deltawatch: {error}", file=sys.stderr)
        return 1


def _configure_logging() -> None:
    # Beam and transformers warn of things nobody here can act on, such as missing cloud libraries.
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    for package in ("pipeline", "transforms", "schemas"):
        logging.getLogger(package).setLevel(logging.WARNING)
    # A broker that is away or refuses is one line of ours; kafka-python would add ten a second.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _run(arguments: Sequence[str]) -> int:
    known, beam_arguments = options.parse(arguments)
    # Torch and Beam take seconds to import: not before the command line is known to be right.
    from pipeline import commands

    return commands.run(known, beam_arguments)


if __name__ == "__main__":
    sys.exit(main())
