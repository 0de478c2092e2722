"""`deltawatch ranges show`: what is in ranges, for a person, as text and as a picture."""

import argparse
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.learning import frozen
from pipeline.place import Place, any_ranges, is_state
from schemas.acts import Act, ActKind
from schemas.artefacts import read_json
from schemas.errors import ConfigurationError
from schemas.records import STEPS_PER_UNIT, Role
from transforms.model import directions
from transforms.ranges.counts import Counts
from transforms.ranges.policies.extremes import flags_at_most
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import series_at, series_of_role
from transforms.ranges.snapshots import MANIFEST

_SHOWN = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
_FORMATS = (".png", ".svg")


def show(known: argparse.Namespace) -> Iterator[str]:
    """Lines about ranges; with --plot also a picture.

    Raises ConfigurationError where there are none, or the picture cannot be made.
    """
    ranges = any_ranges(known.ranges, known.model)
    names = _names(known.directions, ranges)
    if known.plot is not None:
        _plot(ranges, known.plot)
    yield from _summary(ranges)
    yield from _story(known, ranges)
    yield ""
    yield from _series(ranges.conversations, names, known.top)


def _summary(ranges: Ranges) -> Iterator[str]:
    yield f"ranges {ranges.hash} of {ranges.model}"
    yield f"directions {ranges.directions_hash}, {ranges.segments.directions} of them"
    for role in Role:
        yield f"{role.name.lower()}: {_counted(ranges, role)}"
    if ranges.judged:
        share = ranges.flagged / ranges.judged
        yield f"while counting: {ranges.flagged:,} of {ranges.judged:,} flagged ({share:.2%})"
    if ranges.accepted is not None:
        yield f"accepted by hand: {ranges.accepted.conversations.total:,} conversations"
    yield range_bound(ranges)


def range_bound(ranges: Ranges) -> str:
    """What the paper promises of policy `range`, so that nobody is surprised by it."""
    count = ranges.conversations.stretches
    user, assistant = (flags_at_most(ranges.segments.directions, int(count[role])) for role in Role)
    return (
        f"--policy range would flag at most {user:.0%} of clean conversations for the user's part, "
        f"{assistant:.0%} for the assistant's (the paper's 2t/n)"
    )


def _counted(ranges: Ranges, role: Role) -> str:
    conversations, segments = (
        int(counts.stretches[role]) for counts in (ranges.conversations, ranges.segments)
    )
    return (
        f"{conversations:,} conversations, {segments:,} segments, {ranges.scores.n[role]:,} scores"
    )


def _story(known: argparse.Namespace, ranges: Ranges) -> Iterator[str]:
    if not is_state(known.ranges):
        made = read_json(known.ranges / MANIFEST)["made"]
        yield "made: " + ", ".join(f"{name} {value}" for name, value in sorted(made.items()))
        return
    place = Place.of(known.ranges, known.model)
    for number, digest in sorted(place.held.generations.items()):
        yield _generation(_day(place, number), place.ranges(digest))
    if frozen(place.held.acts):
        yield "FROZEN: nothing is learnt"
    for act in place.held.acts:
        yield _act(place, act, f"since epoch {act.epoch}" if act.done else "NOT DONE")
    for act in place.waiting:
        yield _act(place, act, "when the open epoch closes")


def _generation(day: str, ranges: Ranges) -> str:
    share = f"{ranges.flagged} of {ranges.judged} flagged" if ranges.judged else "none judged"
    return f"{day}: {ranges.conversations.total:,} conversations, {share}"


def _act(place: Place, act: Act, effect: str) -> str:
    when = _utc(act.when_ms).isoformat(timespec="seconds")
    return f"{act.kind}{_object(place, act)} by {act.who} at {when}, {effect}: {act.why}"


def _object(place: Place, act: Act) -> str:
    """What an act is about; of an accept the id that `revoke` takes."""
    if act.kind is ActKind.ROLLBACK and act.generation is not None:
        return f" to {_day(place, act.generation)}"
    named = act.id if act.kind is ActKind.ACCEPT else act.revoked
    return f" {named}" if named else ""


def _day(place: Place, generation: int) -> str:
    return _utc(place.calendar.begin(generation)).date().isoformat()


def _utc(time: int) -> datetime:
    return datetime.fromtimestamp(time / 1000, UTC)


def _series(counts: Counts, names: Sequence[str], top: int) -> Iterator[str]:
    """The series that reach farthest beyond what half of the conversations do."""
    found = {name: counts.quantile(q) for name, q in _SHOWN.items()}
    reach = np.where(counts.maximum > np.iinfo(np.int16).min, counts.maximum - found["p50"], 0)
    columns = " ".join(f"{name:>9}" for name in (*_SHOWN, "farthest"))
    yield f"{'direction':<14}{'role':<11}{'side':<6}{columns}"
    for index in np.argsort(-reach, kind="stable")[:top].tolist():
        series = series_at(index, counts.directions)
        values = [*(found[name][index] for name in _SHOWN), counts.maximum[index]]
        cosines = " ".join(f"{series.cosine(int(each)) / STEPS_PER_UNIT:>+9.4f}" for each in values)
        where = f"{names[series.direction]:<14}{series.role.name.lower():<11}{series.side:<6}"
        yield where + cosines


def _names(folder: Path | None, ranges: Ranges) -> list[str]:
    if folder is None:
        return [f"#{number}" for number in range(ranges.segments.directions)]
    artefact = directions.load(folder)
    if artefact.hash != ranges.directions_hash:
        raise ConfigurationError(f"the ranges are of other directions than those in {folder}")
    return [entry.name for entry in artefact.entries]


def _plot(ranges: Ranges, path: Path) -> None:
    if path.suffix not in _FORMATS:
        raise ConfigurationError(f"--plot {path} is no picture; give a path in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigurationError(
            "--plot needs matplotlib, which comes with `pip install deltawatch[plot]`"
        ) from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, role in zip(figure.subplots(len(Role), sharex=True), Role, strict=True):
        _draw(axes, ranges.conversations, role)
    figure.suptitle(f"{ranges.model}: ranges {ranges.hash[:12]}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write --plot {path} ({error.strerror}); give a path in a writable folder"
        ) from None


def _draw(axes: Any, counts: Counts, role: Role) -> None:
    """Bands of a role's directions, in stored order: what 50%, 99% and all conversations reach."""
    mine, places = series_of_role(role, counts.directions), np.arange(counts.directions)
    reached = (
        ("all", counts.maximum.astype(np.int32), 0.2),
        ("99%", counts.quantile(0.99), 0.4),
        ("half", counts.quantile(0.5), 0.8),
    )
    for name, values, shade in reached:
        high, negated_low = np.split(values[mine] / STEPS_PER_UNIT, 2)
        axes.fill_between(places, -negated_low, high, step="mid", alpha=shade, label=name)
    count = int(counts.stretches[role])
    axes.set_title(f"{role.name.lower()}, {count:,} conversations")
    axes.set_ylabel("cosine")
    axes.set_xlabel("direction, in stored order")
    axes.legend(loc="upper right")
