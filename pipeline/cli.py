"""The `deltawatch` command: options in, exit status out.

Exit status: 0 done, 1 the run failed or its counts do not add up, 2 wrong use or configuration.
"""

import os
import sys
from collections.abc import Sequence

from pipeline import log_lines, options
from schemas.errors import ConfigurationError, RunFailedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned, messages go to stderr."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is what is on disk, never a download
    # Torch's waiting threads otherwise spin: with a broker on the same cores the model is up to 40
    # times slower. Torch asks when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    log_lines.configure("text")  # until options say otherwise
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except ConfigurationError as error:
        log_lines.failed(error)
        return 2
    except RunFailedError as error:
        log_lines.failed(error)
        return 1


def _run(arguments: Sequence[str]) -> int:
    known, beam_arguments = options.parse(arguments)
    if "log_format" in known:
        log_lines.configure(known.log_format)
    # Torch and Beam take seconds to import: not before the command line is known to be right.
    from pipeline import commands

    return commands.run(known, beam_arguments)


if __name__ == "__main__":
    sys.exit(main())
