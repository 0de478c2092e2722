"""What each command does once its options are known."""

import argparse
import signal
import threading
import time
from collections.abc import Callable, Sequence

from pipeline import calibrating, preflight, report
from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State
from schemas.commit import Commit
from schemas.errors import ConfigurationError, RunFailedError
from transforms.model import directions

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells have it."""

PERIOD_SECONDS = 1
"""From the start of one slice of `watch` to that of the next, at least: a commit has its price."""


def run(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    """Run the command that `known` names; returns the exit status.

    Raises:
      ConfigurationError: found wrong before anything started.
      RunFailedError: the run cannot be trusted.
    """
    commands: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
        "directions": _directions,
        "calibrate": _calibrate,
        "audit": _audit,
        "watch": _watch,
        "demo": _demo,
    }
    return commands[known.command](known, beam_arguments)


def follow(slices: Slices, stop: threading.Event, *, endless: bool) -> None:
    """Run slices until the logs end, or for ever until `stop` is set."""
    while not stop.is_set():
        started = time.monotonic()
        commit = slices.step()
        if commit is not None:
            _report(slices, commit, time.monotonic() - started)
        elif not endless:
            return
        if endless:
            stop.wait(started + PERIOD_SECONDS - time.monotonic())


def _report(slices: Slices, commit: Commit, seconds: float) -> None:
    report.slice_done(commit, slices.lag(), seconds)
    if commit.to_archive:
        report.epochs_closed(commit, slices.ranges())


def _directions(known: argparse.Namespace, _: Sequence[str]) -> int:
    preflight.check_writable(known.out, "--out")
    found = directions.compute_directions(
        known.base, known.tuned, known.top_k, known.skip_last, known.model_name
    )
    directions.save(found, known.out)
    layers = {entry.layer for entry in found.entries}
    report.say(f"{len(found.entries)} directions of {len(layers)} layers in {known.out}")
    return 0


def _calibrate(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    calibrating.calibrate(known, beam_arguments, follow)
    return 0


def _audit(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    job = preflight.job(known, beam_arguments, endless=False)
    state = State(known.state or job.archive / f"_state-{job.run_id}")
    if _follow_until_stopped(job, state, endless=False):
        raise RunFailedError("stopped before the end; the same command goes on from there")
    if known.state is None:
        state.remove()
    return 0


def _watch(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    job = preflight.job(known, beam_arguments, endless=True)
    state = State(known.state)
    _follow_until_stopped(job, state, endless=True)
    return 0


def _demo(known: argparse.Namespace, _: Sequence[str]) -> int:
    try:
        from pipeline.demo import run as demo
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the demo needs {error.name}, which comes with `pip install deltawatch[demo]`; "
            f"run `make demo` in the repository"
        ) from None
    # A demo that is told to end must stop its broker and its watch first, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = demo.make_ranges if known.make_ranges else demo.run
    try:
        return command(known.build, known.examples)
    except KeyboardInterrupt:
        report.say("stopped, and everything it had started")
        return INTERRUPTED


def _follow_until_stopped(job: Job, state: State, *, endless: bool) -> bool:
    """Whether a signal ended it."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    slices = Slices(job, state, paced=endless)
    report.started(job, state.root, slices.commit)
    follow(slices, stop, endless=endless)
    report.totals(slices.commit, job)
    state.close()
    return stop.is_set()
