"""What a slice's run left in its folder, gathered for the commit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.job import Job, Model
from schemas.arrow import QUANTILES, RANGES
from schemas.plan import Plan
from transforms.archive import files, pending, rows
from transforms.judge import RING
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import per_series

_QUANTILES = dict(zip(QUANTILES, (0.5, 0.9, 0.99, 0.999), strict=True))


class Kept(NamedTuple):
    """Ranges of closed epochs, and the counts of the epoch after them."""

    closed: Ranges
    open: Ranges


def ranges_after(before: Kept, plan: Plan, job: Job, model: Model, folder: Path) -> Kept:
    """A model's ranges after a slice, each closed epoch's also as rows of table `ranges`.

    Args:
      before: as the slice found them.
      plan: of the slice.
      job: the configuration.
      model: whose ranges they are.
      folder: of the slice; where the judge left what it closed, and rows are left.
    """
    if plan.closed_after is None or plan.closed_before is None:
        return before
    after = plan.closed_after + 1
    opened = pending.pending_path(folder, model.name, "open", after, pending.RANGES)
    if opened.exists():
        return _from_judge(before, opened, folder, job, model)
    if plan.complete_through is None:
        return before
    # No record of the slice reached the judge: the open epoch closes with what it had.
    merged = close(before.closed, before.open)
    # As many as the judge closes of a model with records; without any, a plan may cross any gap.
    newest = min(plan.closed_after, plan.closed_before + (RING if plan.records else 1))
    _write_rows(merged, range(plan.closed_before + 1, newest + 1), folder, job, model)
    return Kept(merged, before.open.emptied())


def pending_files(
    before: Mapping[int, tuple[str, ...]], folder: Path, root: Path
) -> dict[int, tuple[str, ...]]:
    """Per epoch the files that wait for the archive, those of this slice's folder added."""
    gathered = dict(before)
    for path in sorted(folder.glob(f"*/*.{pending.TABLES}")):
        epoch = pending.epoch_of(path)
        gathered[epoch] = (*gathered.get(epoch, ()), str(path.relative_to(root)))
    return gathered


def _from_judge(before: Kept, opened: Path, folder: Path, job: Job, model: Model) -> Kept:
    closed = before.closed
    for path in sorted(opened.parent.glob("closed-*"), key=pending.epoch_of):
        closed = _read(path)
        _write_rows(closed, [pending.epoch_of(path)], folder, job, model)
    return Kept(closed, _read(opened))


def _read(path: Path) -> Ranges:
    ranges = Ranges.from_bytes(path.read_bytes())
    path.unlink()  # the state keeps it by its hash from here on
    return ranges


def _write_rows(
    ranges: Ranges, epochs: Iterable[int], folder: Path, job: Job, model: Model
) -> None:
    counts = ranges.conversations
    quantiles = {name: counts.quantile_of_all(q) for name, q in _QUANTILES.items()}
    for epoch in epochs:
        table = rows.ranges_table(
            epoch,
            epoch * job.epoch_ms if job.dated else None,
            ranges.hash,
            per_series(counts.stretches, counts.directions),
            counts.maximum,
            quantiles,
            model.directions.entries,
            model.directions.hash,
        )
        path = pending.pending_path(folder, model.name, RANGES, epoch, pending.TABLES)
        files.write_table(table, path)
