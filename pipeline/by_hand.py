"""What a person does to ranges: `deltawatch ranges accept`, `freeze`, `rollback` and so on.

On a state directory an act is left for its job, which does it when an epoch closes: so all
conversations of an epoch are judged by the same ranges, whether the job is running or not. A
snapshot never changes: a new one is made of it.
"""

import argparse
import getpass
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import report
from pipeline.learning import accepted, frozen
from pipeline.place import Place, any_ranges, is_state, names_in, short
from pipeline.state import ask, newest_commit, policy_of
from schemas.acts import Act, ActKind
from schemas.artefacts import read_json
from schemas.errors import ConfigurationError
from schemas.records import Role
from transforms.archive.chosen import Choice, Found, read_chosen, read_others
from transforms.ranges.policies import DEFAULT_POLICY, Policy, PolicySettings, make_policy
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import Stretches
from transforms.ranges.snapshots import MANIFEST, save_snapshot


def accept(known: argparse.Namespace) -> None:
    """Admit conversations of an archive into ranges."""
    since, until = (each and _ms(each) for each in (known.since, known.until))
    choice = Choice(_ids(known), since, until)
    if choice.is_everything:
        raise ConfigurationError("say which conversations: --alert, --ids, --since or --until")
    place = _archived_place(known) if is_state(known.ranges) else None
    ranges = place.ranges() if place else any_ranges(known.ranges, known.model)
    # A snapshot may be used under another name than the one it was made with.
    model = known.model or (place or ranges).model
    with _readable(known.archive):
        found = _found(known.archive, model, ranges, choice)
        group = ranges.emptied().plus(Stretches.of(found.segments))
        _say_what_passes(known.archive, model, ranges, group, found, place)
    if place:
        _ask(known, place, ActKind.ACCEPT, accepted=group)
    else:
        _save(known, ranges.accepting(group), {"accepted_into": ranges.hash})
    report.say(f"{group.conversations.total} conversations of {model} are to count as normal")


def _archived_place(known: argparse.Namespace) -> Place:
    """Where what is accepted goes: --model chooses among several.

    The only one may have been archived under another name: there --model is the archive's.
    """
    commit = newest_commit(known.ranges)
    alone = commit is not None and len(names_in(known.ranges, commit)) == 1
    return Place.of(known.ranges, None if alone else known.model)


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(
            f"{archive} cannot be read ({str(error).splitlines()[0]}); restore its files"
        ) from None


def _found(archive: Path, model: str, ranges: Ranges, choice: Choice) -> Found:
    found = read_chosen(archive, model, ranges.directions_hash, ranges.segments.directions, choice)
    unknown = sorted(choice.ids - found.ids)
    if unknown or not found.segments.conversations:
        by_id = f"alert or conversation {unknown[0]!r}" if unknown else None
        raise ConfigurationError(
            f"{archive} holds no {by_id or 'flagged conversation of that time'} of model {model}; "
            "rows appear once their epoch has closed, and --model says under which name"
        )
    return found


def _say_what_passes(
    archive: Path, model: str, ranges: Ranges, group: Ranges, found: Found, place: Place | None
) -> None:
    """Warn of alerts that nobody chose and that would not come again all the same.

    Where an accepted conversation looks like a planted behaviour, that is how it shows.
    """
    policy = (place and _policy(place)) or make_policy(DEFAULT_POLICY, PolicySettings())
    before, after = policy.fit(ranges), policy.fit(ranges.accepting(group))
    if None in before.thresholds:
        report.say("WARNING: not calibrated, so it cannot be told which other alerts would pass")
    flagged = passing = 0
    for segments in read_others(
        archive, model, ranges.directions_hash, ranges.segments.directions, found
    ):
        over = before.judge(segments).flagged
        flagged += int(over.sum())
        passing += int((over & ~after.judge(segments).flagged).sum())
    if passing:
        report.say(
            f"WARNING: of {flagged:,} others that are flagged in {archive} {passing:,} would pass "
            "from then on: read some of them, and `revoke` if they are not normal"
        )


def revoke(known: argparse.Namespace) -> None:
    """Take back one accept."""
    place = _place(known)
    kept = accepted([*place.held.acts, *place.waiting], place.calendar)
    if known.id not in {act.id for act in kept}:
        raise ConfigurationError(
            f"{known.ranges} has no accept {known.id!r} in force; `ranges show` lists their ids"
        )
    _ask(known, place, ActKind.REVOKE, revoked=known.id)


def freeze(known: argparse.Namespace) -> None:
    """Let ranges stay as they are."""
    place = _place(known)
    if _frozen_then(place):
        raise ConfigurationError(f"{known.ranges} is frozen{_once(place)}; `thaw` ends it")
    _ask(known, place, ActKind.FREEZE)


def thaw(known: argparse.Namespace) -> None:
    """Let ranges learn again."""
    place = _place(known)
    if not _frozen_then(place):
        raise ConfigurationError(
            f"{known.ranges} is not frozen{_once(place)}; there is nothing to thaw"
        )
    _ask(known, place, ActKind.THAW)


def _frozen_then(place: Place) -> bool:
    """Whether nothing will be learnt once all that was asked for is done."""
    return frozen([*place.held.acts, *place.waiting])


def _once(place: Place) -> str:
    """From when on that is so, and by what, where it has only been asked for."""
    asked = [act for act in place.waiting if act.kind in (ActKind.FREEZE, ActKind.THAW)]
    if not asked:
        return ""
    last = asked[-1]
    return f" once the open epoch closes ({last.who} asked for {last.kind}: {last.why})"


def rollback(known: argparse.Namespace) -> None:
    """Let ranges be as they were at the end of a day."""
    place, asked = _place(known), known.to.date().isoformat()
    last = place.calendar.generation_at(_ms(known.to))
    left = [digest for number, digest in place.held.generations.items() if number <= last]
    if not left:
        raise ConfigurationError(
            f"{known.ranges} holds nothing of days up to {asked}; `ranges show` lists its days"
        )
    for role in _lost(place, reduce(close, map(place.ranges, left))):
        report.say(
            f"WARNING: by {asked} too few conversations had been counted: role {role.name.lower()} "
            "will not be judged until there are enough again"
        )
    _ask(known, place, ActKind.ROLLBACK, generation=last)


def _lost(place: Place, left: Ranges) -> list[Role]:
    """Roles that are calibrated and would not be by what is left, as far as the policy is known."""
    policy = _policy(place)
    if policy is None:
        return []
    now, then = policy.missing(place.ranges()), policy.missing(left)
    return [role for role in Role if then[role] and not now[role]]


def _policy(place: Place) -> Policy | None:
    """Of the job on a state; None: no command has run on it yet."""
    try:
        return policy_of(read_json(place.root / "job.json"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merge(known: argparse.Namespace) -> None:
    """Make one snapshot of several snapshots or state directories."""
    parts = [any_ranges(folder, known.model) for folder in known.ranges]
    _save(known, reduce(Ranges.merged, parts), {"merged": [part.hash for part in parts]})


def _place(known: argparse.Namespace) -> Place:
    if not is_state(known.ranges):
        raise ConfigurationError(
            f"{known.ranges} is no state directory; a snapshot never changes, so there is nothing "
            f"to {known.action}"
        )
    return Place.of(known.ranges, known.model)


def _ask(
    known: argparse.Namespace,
    place: Place,
    kind: ActKind,
    *,
    accepted: Ranges | None = None,
    **what: Any,
) -> None:
    """Leave an act for the job; `what` are attributes of its kind."""
    now = time.time_ns() // 10**6
    name, digest = f"{now}-{kind}-{uuid.uuid4().hex[:8]}", accepted.hash if accepted else ""
    act = Act(name, kind, place.model, _who(known), now, known.why, digest, **what)
    with _written(place.root, "do it as the user that the job runs as"):
        ask(place.root, act, accepted)
    report.say(
        f"{kind} of {place.model} asked for as {name}; it takes effect when the open epoch closes"
    )


def _save(known: argparse.Namespace, ranges: Ranges, made: Mapping[str, Any]) -> None:
    if known.out is None:
        raise ConfigurationError("a snapshot never changes: give --out for the new one")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    story = {**_kept(known.ranges), **made, "who": _who(known), "when": when, "why": known.why}
    with _written(known.out, "give --out a writable folder"):
        if (known.out / MANIFEST).exists():
            raise ConfigurationError(f"{known.out} holds a snapshot already; give another --out")
        save_snapshot(ranges, known.out, story)
    report.say(f"ranges {ranges.hash[:12]} in {known.out}")


def _kept(folders: Path | Sequence[Path]) -> dict[str, Any]:
    """What a snapshot inherits: where its conversations were cut.

    Raises ConfigurationError where that was not the same for all.
    """
    several = [folders] if isinstance(folders, Path) else folders
    lengths = {_max_tokens(folder) for folder in several}
    if len(lengths) > 1:
        raise ConfigurationError(
            f"their conversations were cut at {' and '.join(map(str, sorted(lengths)))} tokens "
            "(--max-tokens); ranges of different lengths cannot be merged"
        )
    return {"max_tokens": lengths.pop()}


def _max_tokens(folder: Path) -> int:
    """0: nowhere, or not known."""
    if is_state(folder):
        commit = newest_commit(folder)
        return commit.max_tokens if commit else 0
    return read_json(folder / MANIFEST)["made"].get("max_tokens") or 0


@contextmanager
def _written(folder: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError of what writes into a folder into ConfigurationError."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"cannot write to {folder} ({short(error)}); {remedy}") from None


def _who(known: argparse.Namespace) -> str:
    try:
        return known.who or getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name where nobody gave it one
        return str(os.getuid())


def _ids(known: argparse.Namespace) -> frozenset[str]:
    listed: list[str] = []
    if known.ids is not None:
        try:
            listed = known.ids.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read --ids {known.ids}: {error}") from None
    return frozenset([*known.alert, *listed])


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
