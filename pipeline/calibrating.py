"""The `calibrate` command: an audit that judges nothing, then ranges fitted to its archive."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline import preflight, report, runner
from pipeline.follow import Follow
from pipeline.job import Job, Model
from pipeline.slices import Slices
from pipeline.state import State
from schemas.commit import Commit
from schemas.errors import ConfigurationError
from schemas.records import Cosines
from transforms.logs.times import EventTime
from transforms.ranges.calibration import calibrate as fit
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import series_values
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
    cosines, tokens = _vectors(job.archive)
    (model,) = job.models
    ranges = fit(series_values(cosines), tokens, model.directions.hash, model.name)
    sources = sorted({each.id.source for each in commit.progress})
    save_snapshot(ranges, known.out, {"sources": sources, "max_tokens": job.max_tokens})
    state.remove()
    report.say(f"ranges of {len(tokens)} conversations in {known.out}")
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


def _vectors(archive: Path) -> tuple[Cosines, np.ndarray]:
    """All score vectors, in the order of the log, so that folds do not depend on slices."""
    tables = archive / "conversations"
    if not tables.exists():
        raise ConfigurationError("no conversation could be scored; see the dead letters beside it")
    columns = ["source", "partition", "offset", "tokens", "low", "high", "low_at", "high_at"]
    table = ds.dataset(tables).to_table(columns=columns)
    table = table.sort_by([(name, "ascending") for name in columns[:3]])
    cosines = Cosines(*(_matrix(table[name]) for name in columns[4:]))
    return cosines, table["tokens"].to_numpy()


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    flat = column.combine_chunks()
    return flat.flatten().to_numpy().reshape(len(flat), flat.type.list_size)
