"""The state directory: plans, commits, ranges, and files that wait for their epoch to close.

```
STATE/job.json                what runs on it, for people and for `deltawatch status`
STATE/plan.json               the slice that is being run; gone once it is committed
STATE/commits/00000012.json   the last ten commits; the newest is the truth
STATE/ranges/HASH.safetensors ranges and counts, named by content
STATE/acts/ID.json            what a person wants done to ranges, until an epoch closes
STATE/pending/00000012/       files of slice 12, until their epoch goes into the archive
```
"""

import fcntl
import shutil
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from schemas.acts import Act
from schemas.artefacts import read_json, write_bytes, write_json
from schemas.commit import Commit
from schemas.errors import ConfigurationError
from schemas.plan import Plan
from transforms.ranges.policies import Policy, PolicySettings, make_policy
from transforms.ranges.ranges import Ranges

COMMITS_KEPT = 10
ACTS = "acts"

_T = TypeVar("_T")


class State:
    """A state directory, held by one process at a time."""

    def __init__(self, root: Path) -> None:
        """Open or make the directory.

        Raises:
          ConfigurationError: it cannot be written, or another process holds it.
        """
        self.root = root
        try:
            for name in ("commits", "ranges", "pending", ACTS):
                (root / name).mkdir(parents=True, exist_ok=True)
            self._lock = _locked(root / "lock")
        except BlockingIOError:
            raise ConfigurationError(
                f"{root} is in use by another deltawatch; stop it or give another --state"
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {root} ({error.strerror}); give --state a writable folder"
            ) from None

    def close(self) -> None:
        """Let another process have the directory."""
        self._lock.close()

    def remove(self) -> None:
        """Drop the directory: everything in it has reached its place."""
        shutil.rmtree(self.root)

    def newest_commit(self) -> Commit | None:
        """The newest commit; None in a new state directory."""
        return newest_commit(self.root)

    def pending_plan(self) -> Plan | None:
        """A plan that was begun and not committed."""
        return pending_plan(self.root, self.newest_commit())

    def take_acts(self, done: Container[str], wanted: Callable[[Act], bool]) -> list[Act]:
        """What people want done to ranges, oldest first; others than those wanted stay.

        Those whose id is done are dropped.
        """
        taken = []
        for act in asked_acts(self.root):
            accepted = self.root / ACTS / f"{act.id}.safetensors"
            if act.id in done:
                (self.root / ACTS / f"{act.id}.json").unlink()
                accepted.unlink(missing_ok=True)
            elif wanted(act):
                taken.append(act)
                if accepted.exists():
                    self.write_ranges(_parsed(accepted))
        return taken

    def describe(self, job: dict[str, Any]) -> None:
        """Say what runs on this state."""
        write_json(self.root / "job.json", job)

    def write_plan(self, plan: Plan) -> None:
        """Fix what the next slice reads, before it is read."""
        write_json(self.root / "plan.json", plan.to_json())

    def drop_plan(self) -> None:
        """Forget the slice that was begun."""
        (self.root / "plan.json").unlink(missing_ok=True)

    def fresh_slice_folder(self, number: int) -> Path:
        """The empty folder for a slice's files; what an earlier try left there is dropped."""
        folder = self.root / "pending" / f"{number:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def drop_empty_folders(self) -> None:
        """Remove folders of slices all of whose files are in the archive."""
        for folder in (self.root / "pending").iterdir():
            if not any(path.is_file() for path in folder.rglob("*")):
                shutil.rmtree(folder)

    def write_commit(self, commit: Commit) -> None:
        """Make a slice's outcome the truth, then forget what only older truths needed."""
        write_json(self.root / "commits" / f"{commit.number:08d}.json", commit.to_json())
        self.drop_plan()
        self._drop_old(_commit_paths(self.root)[:-COMMITS_KEPT])

    def ranges_path(self, digest: str) -> Path:
        """Where ranges with this hash are kept."""
        return ranges_path(self.root, digest)

    def write_ranges(self, ranges: Ranges) -> str:
        """Keep ranges under their hash; returns it."""
        path = self.ranges_path(ranges.hash)
        if not path.exists():
            write_bytes(path, ranges.to_bytes())
        return ranges.hash

    def read_ranges(self, digest: str) -> Ranges:
        """Ranges kept under this hash.

        Raises ConfigurationError where their file is damaged, and OSError, after which a job tries
        again, where it cannot be read.
        """
        return _parsed(self.ranges_path(digest), digest)

    def _drop_old(self, commits: Iterable[Path]) -> None:
        for path in commits:
            path.unlink()
        kept = [_read(path, Commit.from_json) for path in _commit_paths(self.root)]
        held = [model for commit in kept for model in commit.models.values()]
        needed = {digest for model in held for digest in model.hashes}
        for path in (self.root / "ranges").glob("*.safetensors"):
            if path.stem not in needed:
                path.unlink()


def model_names(job: Mapping[str, Any]) -> list[str]:
    """Of the models that a job judges, by what `job.json` says of it."""
    return list(job.get("models") or [job["model"]])


def policy_of(job: Mapping[str, Any]) -> Policy:
    """What decides about a job's conversations, by what `job.json` says of it."""
    return make_policy(job["policy"], PolicySettings(**job["settings"]))


def newest_commit(root: Path) -> Commit | None:
    """The newest commit in a state directory that another process may hold; None: none yet."""
    paths = _commit_paths(root)
    return _read(paths[-1], Commit.from_json) if paths else None


def oldest_commit(root: Path) -> Commit | None:
    """The oldest commit that is kept in a state directory; None: none yet."""
    for path in _commit_paths(root):
        with suppress(FileNotFoundError):  # a job that runs drops the oldest
            return _read(path, Commit.from_json)
    return None


def asked_acts(root: Path) -> list[Act]:
    """What people want done to the ranges of a state directory, oldest first."""
    acts = []
    for path in (root / ACTS).glob("*.json"):
        with suppress(FileNotFoundError):  # the job has done it meanwhile
            acts.append(_read(path, Act.from_json))
    return sorted(acts, key=lambda act: (act.when_ms, act.id))


def ask(root: Path, act: Act, accepted: Ranges | None = None) -> None:
    """Leave an act for the job on a state directory, which does it when an epoch closes."""
    folder = root / ACTS
    folder.mkdir(exist_ok=True)
    if accepted is not None:
        write_bytes(folder / f"{act.id}.safetensors", accepted.to_bytes())
    write_json(folder / f"{act.id}.json", act.to_json())


def ranges_path(root: Path, digest: str) -> Path:
    """Where a state directory keeps ranges with this hash."""
    return root / "ranges" / f"{digest}.safetensors"


def read_ranges(root: Path, digest: str) -> Ranges:
    """Ranges that a state directory keeps under a hash.

    Raises ConfigurationError where their file cannot be read or is damaged.
    """
    path = ranges_path(root, digest)
    try:
        return _parsed(path, digest)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None


def _parsed(path: Path, digest: str | None = None) -> Ranges:
    """Ranges in a file; of what hash, where it is known."""
    try:
        return Ranges.from_bytes(path.read_bytes(), digest)
    except ValueError as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot be read ({why}); restore the state from a backup")


def pending_plan(root: Path, newest: Commit | None) -> Plan | None:
    """A plan in a state directory that was begun and not committed."""
    path = root / "plan.json"
    if not path.exists():
        return None
    plan = _read(path, Plan.from_json)
    return plan if newest is None or plan.number > newest.number else None


def _read(path: Path, parse: Callable[[Any], _T]) -> _T:
    try:
        return parse(read_json(path))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read by this version ({error}); go on with the version that wrote "
            f"it, or give another --state"
        ) from None


def _commit_paths(root: Path) -> list[Path]:
    return sorted((root / "commits").glob("*.json"))


def _locked(path: Path) -> IO[str]:
    handle = path.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle
