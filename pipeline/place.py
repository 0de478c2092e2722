"""Where ranges are that a person looks at or changes: a state directory, or a snapshot."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.state import asked_acts, model_names, newest_commit, read_ranges
from schemas.acts import Act
from schemas.artefacts import read_json
from schemas.commit import Commit, ModelState
from schemas.errors import ConfigurationError
from transforms.ranges.generations import Calendar
from transforms.ranges.ranges import Ranges
from transforms.ranges.snapshots import MANIFEST, load_snapshot


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
        names = names_in(root, commit)
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
    def waiting(self) -> list[Act]:
        """What was asked for and has not been done yet, oldest first."""
        names = names_in(self.root, self.commit)
        return [
            act
            for act in asked_acts(self.root)
            if act.id not in self.commit.done and self.commit.concerned(act, names) == self.model
        ]

    @property
    def calendar(self) -> Calendar:
        """Of its generations."""
        return Calendar(self.commit.epoch_ms)

    def ranges(self, digest: str | None = None) -> Ranges:
        """Its ranges of closed epochs, or others that it keeps; raises as `read_ranges`."""
        return read_ranges(self.root, digest or self.held.ranges_hash)


def is_state(folder: Path) -> bool:
    """Whether a folder is a state directory, not a snapshot.

    Raises ConfigurationError where this user may not look.
    """
    try:
        return (folder / "commits").is_dir()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {folder} ({short(error)}); do it as the user that the job runs as"
        ) from None


def any_ranges(folder: Path, model: str | None) -> Ranges:
    """Ranges of a snapshot, or of a state directory."""
    if is_state(folder):
        return Place.of(folder, model).ranges()
    return load_snapshot(folder, _directions_hash(folder))


def names_in(root: Path, commit: Commit) -> list[str]:
    """Of the models that the job on a state judges now."""
    try:
        named = sorted(model_names(read_json(root / "job.json")))
    except (OSError, ValueError):  # no command has run on it yet
        return sorted(commit.models)
    return named if set(named) <= commit.models.keys() else sorted(commit.models)


def short(error: OSError) -> str:
    """What went wrong, without the path."""
    return error.strerror or str(error)


def _directions_hash(folder: Path) -> str:
    try:
        return str(read_json(folder / MANIFEST)["directions_hash"])
    except (OSError, ValueError, KeyError):
        raise ConfigurationError(
            f"{folder} is neither a ranges snapshot nor a state directory"
        ) from None
