"""What a commit makes public: closed epochs into the archive, shifts of traffic to the alerts.

Every row is visible exactly once; a shift is told at least once, under the same id.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline import report
from pipeline.job import Job
from pipeline.state import State
from schemas.artefacts import canonical_json
from schemas.commit import Commit
from schemas.range_shift import to_ocsf
from transforms.archive import files, pending
from transforms.delivery.sinks import open_sink


def finish_epochs(job: Job, state: State, commit: Commit) -> None:
    """Merge the files of epochs that the commit closed; repeating it changes nothing."""
    for epoch, names in commit.to_archive.items():
        # By the configuration of the commit: that of the job may have changed since.
        _finish(job.archive, f"{commit.config_hash[:12]}-{epoch}", [state.root / n for n in names])
    state.drop_empty_folders()


def tell_shifts(job: Job, commit: Commit) -> None:
    """Send an event for every shift of traffic that the commit tells of."""
    events = [event for held in commit.models.values() for event in held.news]
    if not events:
        return
    sink = open_sink(job.alerts, job.kafka_properties)
    for event in events:
        sink.send(event.id.encode(), canonical_json(to_ocsf(event)))
        report.shifted(event)
    sink.flush()


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
