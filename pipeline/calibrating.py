"""The `calibrate` command: an audit that judges nothing, then ranges fitted to its archive."""

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline import preflight, report, runner
from pipeline.follow import Follow
from pipeline.job import Job, Model
from pipeline.showing import range_bound
from pipeline.slices import Slices
from pipeline.state import State
from schemas.arrow import CONVERSATIONS
from schemas.commit import Commit
from schemas.errors import ConfigurationError
from transforms.archive.segments import read_segments
from transforms.logs.times import EventTime
from transforms.ranges.calibration import calibrate as fit
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges
from transforms.ranges.snapshots import save_snapshot

NEVER = 2**31 - 1
"""More conversations than a calibration will have: nothing is judged while it runs."""

ONLY_EPOCH = 0
"""Everything is of it; it closes when the log has been read."""


def calibrate(known: argparse.Namespace, beam_arguments: Sequence[str]) -> Ranges:
    """Score a log of normal traffic, keep its vectors in OUT/vectors, write ranges to OUT.

    Raises:
      ConfigurationError: found wrong before anything started, or nothing could be scored.
    """
    job = _job(known, beam_arguments)
    state = State(known.out / "_state")
    if state.newest_commit() is None:  # what lies there is of another calibration
        shutil.rmtree(job.archive, ignore_errors=True)
    commit = _scored(job, state, known.patience / 1000)
    report.totals(commit, job)
    state.close()
    (model,) = job.models
    parts = partial(read_segments, _files(job.archive), len(model.directions))
    ranges = fit(parts, model.base_ranges)
    sources = sorted({each.id.source for each in commit.progress})
    save_snapshot(ranges, known.out, {"sources": sources, "max_tokens": job.max_tokens})
    state.remove()
    report.say(f"ranges of {ranges.conversations.total} conversations in {known.out}")
    report.say(range_bound(ranges))
    return ranges


def _scored(job: Job, state: State, patience_s: float) -> Commit:
    """Score the log to its end; where that has been done, what has come since is left alone."""
    begun = state.newest_commit()
    if begun is not None and begun.config_hash != job.config_hash:
        raise ConfigurationError(
            f"{state.root} holds a calibration that was begun with other options; finish it with "
            f"those, or remove that folder"
        )
    closed = None if begun is None else begun.closed_epoch
    if closed is not None and closed >= ONLY_EPOCH:
        return Slices(job, state).commit
    loop = Follow(False, patience_s)
    loop.stop_on_signals()
    commit = loop.run(lambda: Slices(job, state))
    loop.require_end()
    return commit


def _job(known: argparse.Namespace, beam_arguments: Sequence[str]) -> Job:
    runner.check_beam_arguments(beam_arguments)
    properties = preflight.kafka_properties(known)
    inputs = preflight.check_inputs(known, properties, endless=False)
    preflight.check_writable(known.out, "--out")
    engine, artefact = preflight.check_model(known)
    name = known.model_name or artefact.manifest.model_name
    empty = Ranges.empty(len(artefact.entries), artefact.hash, name)
    return Job(
        inputs=inputs,
        event_time=EventTime(known.event_time),
        epoch_ms=preflight.ONE_EPOCH_MS,
        models=(Model(name, engine, artefact, empty),),
        policy=make_policy("range", PolicySettings(min_calibration=NEVER)),
        archive=known.out / "vectors",
        alerts=str(known.out / "alerts.jsonl"),
        dead_letters=str(known.out / "dead_letters.jsonl"),
        max_tokens=preflight.check_max_tokens(known, engine),
        batch_tokens=preflight.batch_tokens(known),
        slice_records=known.slice_records,
        kafka_properties=properties,
        beam_arguments=tuple(beam_arguments),
    )


def _files(archive: Path) -> list[Path]:
    """Files with the segments of all conversations."""
    files = sorted((archive / CONVERSATIONS).rglob("*.parquet"))
    if not files:
        raise ConfigurationError("no conversation could be scored; see the dead letters beside it")
    return files
