"""What a job says on stderr while it runs: a sentence, and for machines its figures as fields."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.job import Job
from pipeline.log_lines import LOGGER
from pipeline.state import State
from schemas.acts import Act
from schemas.commit import Commit
from schemas.range_shift import RangeShift
from transforms.model.directions import Directions
from transforms.ranges.policies import Missing
from transforms.ranges.ranges import Ranges

PROGRESS_SECONDS = 3

_log = logging.getLogger(LOGGER)


def say(text: str, **fields: Any) -> None:
    """One line; where lines are JSON, with these fields. `event` names what happened."""
    _log.info(text, extra=fields)


def answer(text: str) -> None:
    """One line of what was asked for, on stdout."""
    print(text)


def started(job: Job, state: State) -> None:
    """What is going to be done, and from where."""
    commit = state.newest_commit()
    begin = f"after slice {commit.number}" if commit else "from the beginning"
    sizes = (f"{name}: {len(found)} directions" for name, found in job.directions.items())
    say(
        f"{', '.join(sizes)}, policy {job.policy.name}",
        event="started",
        **job.description(),
    )
    say(f"reading {', '.join(job.inputs)} {begin}; state in {state.root}")


def trying_again(error: Exception, pause: float) -> None:
    """A slice failed for a reason outside."""
    say(
        f"{error}; trying again in {pause} s",
        event="trying_again",
        pause_s=pause,
    )


class Progress:
    """Says every few seconds how far something is that takes long and is otherwise silent."""

    def __init__(self, what: str) -> None:
        """Take the plural name of what is counted, and start the clock."""
        self._what = what
        self._started = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Note that so many of all are done."""
        now = time.monotonic()
        if now - self._said < PROGRESS_SECONDS or done == total:
            return
        self._said = now
        left = (now - self._started) / done * (total - done)
        say(f"{done} of {total} {self._what} done, about {left:,.0f} s left")


def directions_made(found: Directions, out: Path) -> None:
    """How many directions there are, and how much of a checkpoint's difference was rounding."""
    layers = {entry.layer for entry in found.entries}
    say(f"{len(found)} directions of {len(layers)} layers in {out}")
    parts = found.manifest.rounding.values()
    if parts:
        same = sum(part.floor == 0 for part in parts)
        say(
            f"{sum(part.cut for part in parts)} more of the largest {found.manifest.top_k} of each "
            f"matrix cannot be told from rounding and were left out; {same} of {len(parts)} "
            "matrices did not change"
        )


def matrices_made(cached: int, fallbacks: Sequence[str]) -> None:
    """What was not computed anew, and what had to be computed the slow way."""
    if cached:
        say(f"{cached} matrices had been decomposed by an earlier run and were not again")
    if fallbacks:
        say(
            f"{len(fallbacks)} matrices were decomposed by LAPACK, because what the fast way found "
            f"could not be verified: {', '.join(fallbacks)}"
        )


def slice_done(commit: Commit, lag: int, seconds: float) -> None:
    """One line a slice: progress, speed, what was found, how much waits."""
    done = commit.slice_ledger
    say(
        f"slice {commit.number}: {done.scored} conversations scored,"
        f" {done.tokens / max(seconds, 1e-3):,.0f} tokens/s, {done.flagged} flagged,"
        f" {done.uncalibrated} not calibrated, {done.dead_lettered} dead letters, lag {lag:,}",
        event="slice_done",
        slice=commit.number,
        seconds=round(seconds, 3),
        lag=lag,
        **asdict(done),
    )


def epochs_closed(
    commit: Commit, ranges: Mapping[str, Ranges], missing: Mapping[str, Missing]
) -> None:
    """One line a model when epochs closed: what the next one is judged against."""
    for name, held in ranges.items():
        named = {"model": name} if len(ranges) > 1 else {}
        user, assistant = held.conversations.stretches
        say(
            f"closed epoch {max(commit.to_archive)}, its rows are in the "
            f"archive; ranges {held.hash[:12]}{f' of {name}' if named else ''} now hold "
            f"{user:,} conversations ({assistant:,} of them with an assistant)"
            f"{_until_calibrated(missing[name])}",
            event="epochs_closed",
            epochs=sorted(commit.to_archive),
            ranges_hash=held.hash,
            conversations=[user, assistant],
            missing=list(missing[name]),
            **named,
        )


def _until_calibrated(missing: Missing) -> str:
    if not any(missing):
        return ""
    user, assistant = missing
    return (
        f"; not calibrated until there are {user:,} more with a user, {assistant:,} more with an "
        "assistant"
    )


def shifted(shift: RangeShift) -> None:
    """Far more was flagged than asked for."""
    say(
        f"{shift.model}: {shift.flagged} of {shift.judged} conversations flagged since epoch"
        f" {shift.since}, {shift.rate:.2%} asked for; if they are normal, admit them with"
        " `deltawatch ranges accept`",
        event="range_shift",
        model=shift.model,
        judged=shift.judged,
        flagged=shift.flagged,
    )


def not_done(act: Act) -> None:
    """What a person wanted cannot be done any more."""
    say(
        f"WARNING: {act.kind} of {act.model}, asked for by {act.who}, was not done: nothing is left"
        " of days up to the one it names",
        event="act_not_done",
        model=act.model,
        act=act.id,
    )


def totals(commit: Commit, job: Job) -> None:
    """The ledger, and where everything lies."""
    say(f"records: {commit.total_ledger}", event="totals", **asdict(commit.total_ledger))
    say(f"alerts: {job.alerts}  dead letters: {job.dead_letters}  archive: {job.archive}")
