"""What each command does once its options are known."""

import argparse
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pipeline import by_hand, calibrating, explaining, metrics, preflight, report, showing
from pipeline.explain import Table
from pipeline.follow import Follow
from pipeline.job import Job
from pipeline.slices import Slices
from pipeline.state import State
from pipeline.status import Status
from schemas.errors import ConfigurationError
from transforms.model import directions
from transforms.model.cache import Cache

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells have it."""


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
        "status": _status,
        "ranges": _ranges,
        "explain": _explain,
        "demo": _demo,
    }
    return commands[known.command](known, beam_arguments)


def _directions(known: argparse.Namespace, _: Sequence[str]) -> int:
    preflight.check_writable(known.out, "--out")
    kept = known.cache or known.out / "unfinished"
    preflight.check_writable(kept, "--cache")
    cache, table = Cache(kept), Table()
    found = directions.compute_directions(
        known.base,
        tuple(known.tuned),
        known.top_k,
        known.skip_last,
        known.model_name,
        report.Progress("matrices"),
        cache,
        table.add,
    )
    directions.save(found, known.out)
    if known.cache is None:
        cache.remove()
    report.directions_made(found, known.out)
    report.matrices_made(cache.hits, table.fallbacks())
    for line in table.lines() if known.explain else ():
        report.answer(line)
    return 0


def _calibrate(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    calibrating.calibrate(known, beam_arguments)
    return 0


def _audit(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    job = preflight.job(known, beam_arguments, endless=False)
    state = State(known.state or job.archive / f"_state-{job.run_id}")
    _follow(job, state, known, endless=False).require_end()
    if known.state is None:
        state.remove()
    return 0


def _watch(known: argparse.Namespace, beam_arguments: Sequence[str]) -> int:
    job = preflight.job(known, beam_arguments, endless=True)
    _follow(job, State(known.state), known, endless=True)
    return 0


def _status(known: argparse.Namespace, _: Sequence[str]) -> int:
    for line in Status.of(known.state, preflight.kafka_properties(known)).lines():
        report.answer(line)
    return 0


def _ranges(known: argparse.Namespace, _: Sequence[str]) -> int:
    if known.action == "show":
        for line in showing.show(known):
            report.answer(line)
        return 0
    acts = {
        "accept": by_hand.accept,
        "revoke": by_hand.revoke,
        "freeze": by_hand.freeze,
        "thaw": by_hand.thaw,
        "rollback": by_hand.rollback,
        "merge": by_hand.merge,
    }
    acts[known.action](known)
    return 0


def _explain(known: argparse.Namespace, _: Sequence[str]) -> int:
    found = explaining.explain(known.archive, known.named)
    for line in (line for explanation in found for line in explanation.lines()):
        report.answer(line)
    return 0 if all(explanation.reproduced for explanation in found) else 1


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


def _follow(job: Job, state: State, known: argparse.Namespace, *, endless: bool) -> Follow:
    """Run slices on a state until the log or a signal ends it."""
    loop = Follow(endless, known.patience / 1000)
    loop.stop_on_signals()
    with ExitStack() as stack:
        stack.callback(state.close)
        if known.metrics_port is not None:
            stack.callback(metrics.serve(job, loop.health, known.metrics_port))
        _load(job)
        loop.health.begun()
        state.describe(job.description())
        report.started(job, state)
        commit = loop.run(lambda: Slices(job, state, paced=endless))
    report.totals(commit, job)
    return loop


def _load(job: Job) -> None:
    """Load the models now: one that cannot be loaded shall not wait for the first record."""
    for model in job.models:
        with metrics.LOAD_SECONDS.labels(model.name).time():
            scorer = model.engine.scorer()
        metrics.MODEL_BYTES.labels(model.name).set(scorer.nbytes)
