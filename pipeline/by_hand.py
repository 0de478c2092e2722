"""What a person does to ranges: `deltawatch ranges accept`, `freeze`, `thaw`, `rollback`, `merge`.

On a state directory an act is left for its job, which does it when an epoch closes: so all
conversations of an epoch are judged by the same ranges, whether the job is running or not. A
snapshot never changes: a new one is made of it.
"""

import argparse
import getpass
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import report
from pipeline.learning import frozen
from pipeline.state import ask, model_names, newest_commit, ranges_path
from schemas.acts import Act, ActKind
from schemas.artefacts import read_json
from schemas.commit import Commit, ModelState
from schemas.errors import ConfigurationError
from schemas.records import Segments
from transforms.archive.flagged import Choice, read_flagged
from transforms.ranges.calibration import accept as accepted_of
from transforms.ranges.generations import Calendar
from transforms.ranges.ranges import Ranges
from transforms.ranges.snapshots import MANIFEST, load_snapshot, save_snapshot


@dataclass(frozen=True)
class Place:
    """A state directory with one model chosen."""

    root: Path
    model: str
    commit: Commit

    @staticmethod
    def of(root: Path, model: str | None) -> "Place":
        """Raises ConfigurationError where there is no state, or no such model, or several."""
        commit = newest_commit(root)
        if commit is None:
            raise ConfigurationError(
                f"{root} holds no commit of a deltawatch; give the --state of `watch` or `audit`"
            )
        names = _names(root, commit)
        if model is None and len(names) > 1:
            raise ConfigurationError(f"give --model, one of {', '.join(names)}")
        if model not in (None, *names):
            raise ConfigurationError(f"{root} holds no model {model!r}, but {', '.join(names)}")
        return Place(root, model or names[0], commit)

    @property
    def held(self) -> ModelState:
        """What the newest commit says of the model."""
        return self.commit.models[self.model]

    @property
    def calendar(self) -> Calendar:
        """Of its generations."""
        return Calendar(self.commit.epoch_ms)

    def ranges(self, digest: str | None = None) -> Ranges:
        """Its ranges of closed epochs, or others that it keeps."""
        path = ranges_path(self.root, digest or self.held.ranges_hash)
        return Ranges.from_bytes(path.read_bytes())


def is_state(folder: Path) -> bool:
    """Whether a folder is a state directory, not a snapshot."""
    return (folder / "commits").is_dir()


def any_ranges(folder: Path, model: str | None) -> Ranges:
    """Ranges of a snapshot, or of a state directory."""
    if is_state(folder):
        return Place.of(folder, model).ranges()
    return load_snapshot(folder, _directions_hash(folder))


def accept(known: argparse.Namespace) -> None:
    """Admit flagged conversations of an archive into ranges."""
    since, until = (each and _ms(each) for each in (known.since, known.until))
    choice = Choice(_ids(known), since, until)
    if choice.is_everything:
        raise ConfigurationError("say which conversations: --alert, --ids, --since or --until")
    ranges = any_ranges(known.ranges, known.model)
    # A snapshot may be used under another name than the one it was made with.
    state = is_state(known.ranges)
    model = Place.of(known.ranges, known.model).model if state else known.model or ranges.model
    found = _found(known.archive, model, ranges, choice)
    group = accepted_of(ranges, found)
    if state:
        _ask(known, ActKind.ACCEPT, accepted=group)
    else:
        _save(known, ranges.accepting(group), {"accepted_into": ranges.hash})
    report.say(f"{found.conversations} conversations of {model} are to count as normal")


def _found(archive: Path, model: str, ranges: Ranges, choice: Choice) -> Segments:
    try:
        found = read_flagged(
            archive, model, ranges.directions_hash, ranges.segments.directions, choice
        )
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(
            f"{archive} cannot be read ({str(error).splitlines()[0]}); restore its files"
        ) from None
    unknown = sorted(choice.ids - found.ids)
    if unknown or not found.segments.conversations:
        what = f"alert or conversation {unknown[0]!r}" if unknown else "conversation of that time"
        raise ConfigurationError(
            f"{archive} holds no flagged {what} of model {model}; rows appear once their epoch "
            "has closed, and --model says under which name"
        )
    return found.segments


def freeze(known: argparse.Namespace) -> None:
    """Let ranges stay as they are."""
    if frozen(_place(known).held.acts):
        raise ConfigurationError(f"{known.ranges} is frozen already; `thaw` ends it")
    _ask(known, ActKind.FREEZE)


def thaw(known: argparse.Namespace) -> None:
    """Let ranges learn again."""
    if not frozen(_place(known).held.acts):
        raise ConfigurationError(f"{known.ranges} is not frozen")
    _ask(known, ActKind.THAW)


def rollback(known: argparse.Namespace) -> None:
    """Let ranges be as they were at the end of a day."""
    place, asked = _place(known), known.to.date().isoformat()
    last = place.calendar.generation_at(_ms(known.to))
    if not any(number <= last for number in place.held.generations):
        raise ConfigurationError(
            f"{known.ranges} holds nothing of days up to {asked}; `ranges show` lists its days"
        )
    _ask(known, ActKind.ROLLBACK, generation=last)


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
    kind: ActKind,
    *,
    generation: int | None = None,
    accepted: Ranges | None = None,
) -> None:
    now, model = time.time_ns() // 10**6, _place(known).model
    name, digest = f"{now}-{kind}-{uuid.uuid4().hex[:8]}", accepted.hash if accepted else ""
    act = Act(name, kind, model, _who(known), now, known.why, digest, generation)
    ask(known.ranges, act, accepted)
    report.say(f"{kind} of {model} asked for; it takes effect when the open epoch closes")


def _save(known: argparse.Namespace, ranges: Ranges, made: Mapping[str, Any]) -> None:
    if known.out is None:
        raise ConfigurationError("a snapshot never changes: give --out for the new one")
    if (known.out / MANIFEST).exists():
        raise ConfigurationError(f"{known.out} holds a snapshot already; give another --out")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    by_hand = {"who": _who(known), "when": when, "why": known.why}
    save_snapshot(ranges, known.out, {**_kept(known.ranges), **made, **by_hand})
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


def _names(root: Path, commit: Commit) -> list[str]:
    """Of the models that the job on a state judges now."""
    try:
        named = sorted(model_names(read_json(root / "job.json")))
    except (OSError, ValueError):  # no command has run on it yet
        return sorted(commit.models)
    return named if set(named) <= commit.models.keys() else sorted(commit.models)


def _directions_hash(folder: Path) -> str:
    try:
        return str(read_json(folder / MANIFEST)["directions_hash"])
    except (OSError, ValueError, KeyError):
        raise ConfigurationError(
            f"{folder} is neither a ranges snapshot nor a state directory"
        ) from None


def _who(known: argparse.Namespace) -> str:
    return known.who or getpass.getuser()


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
