"""Closed epochs, from the state directory into the archive: every row visible exactly once."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.job import Job
from pipeline.state import State
from schemas.commit import Commit
from transforms.archive import files, pending


def finish_epochs(job: Job, state: State, commit: Commit) -> None:
    """Merge the files of epochs that the commit closed; repeating it changes nothing."""
    for epoch, names in commit.to_archive.items():
        # By the configuration of the commit: that of the job may have changed since.
        _finish(job.archive, f"{commit.config_hash[:12]}-{epoch}", [state.root / n for n in names])
    state.drop_empty_folders()


def _finish(archive: Path, name: str, paths: Sequence[Path]) -> None:
    # Deleting begins only once everything is in the archive: with one file gone, all of it is.
    if all(path.exists() for path in paths):
        for (table, model), members in _by_table(paths).items():
            files.merge(members, archive, table, model, name)
    for path in paths:
        path.unlink(missing_ok=True)


def _by_table(paths: Sequence[Path]) -> dict[tuple[str, str], list[Path]]:
    tables = defaultdict(list)
    for path in paths:
        tables[pending.what_of(path), pending.model_of(path)].append(path)
    return dict(tables)
