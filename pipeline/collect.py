"""What a slice's run left in its folder, gathered for the commit."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipeline import report
from pipeline.job import Job, Model
from pipeline.learning import Learned, Store
from schemas.acts import Act
from schemas.arrow import QUANTILES, RANGES
from schemas.artefacts import combined_hash
from schemas.commit import ModelState, Shift
from schemas.ids import range_shift_id
from schemas.plan import Plan
from schemas.range_shift import RangeShift
from transforms.archive import files, fitted, pending, rows
from transforms.judge import RING
from transforms.ranges.policies import label
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import per_series
from transforms.ranges.shift import after_epoch

_QUANTILES = dict(zip(QUANTILES, (0.5, 0.9, 0.99, 0.999), strict=True))


class Counted(NamedTuple):
    """What a slice counted of a model: in epochs that it closed, and in the one after them."""

    closed: list[tuple[int, Ranges]]
    open: Ranges


def model_after(
    held: ModelState,
    plan: Plan,
    job: Job,
    model: Model,
    folder: Path,
    store: Store,
    acts: Sequence[Act],
) -> ModelState:
    """What the state holds of a model after a slice; its ledger is the caller's.

    Args:
      held: as the slice found it.
      plan: of the slice.
      job: the configuration.
      model: whose it is.
      folder: of the slice; where the judge left what it counted, and rows of table `ranges` are
        left of every epoch closed, and of what the open one is judged by where there are none yet.
      store: has the ranges.
      acts: what people want done to the ranges; it is, where an epoch closes.
    """
    held = replace(held, news=())
    if plan.closed_after is None or plan.closed_before is None:
        return held
    counted = _counted(held, plan, model, folder, store)
    opened = store.write_ranges(counted.open)
    begun = _untold(held, plan.closed_before, job, model, store)
    if not counted.closed:
        _write_rows(begun, plan.closed_before + 1, folder, job, model)
        return replace(held, open_hash=opened, told=_told(held.ranges_hash, job, model))
    before = Learned.of(held, store, job.calendar)
    learned = _learned(before, counted, plan.closed_after + 1, job, acts)
    totals = _totals(before, learned, counted)
    _write_rows([*begun, *totals], plan.closed_before + 1, folder, job, model)
    ranges_hash = store.write_ranges(learned.total)
    shift, news = _shifted(held.shift, counted, plan, job, model)
    if any(act.done for act in learned.acts[len(before.acts) :]):
        shift = Shift()  # what was too much is now judged anew
    return replace(
        held,
        ranges_hash=ranges_hash,
        open_hash=opened,
        generations=learned.generations,
        acts=learned.acts,
        shift=shift,
        news=news,
        told=_told(ranges_hash, job, model),
    )


def pending_files(
    before: Mapping[int, tuple[str, ...]], folder: Path, root: Path
) -> dict[int, tuple[str, ...]]:
    """Per epoch the files that wait for the archive, those of this slice's folder added."""
    gathered = dict(before)
    for path in sorted(folder.glob(f"*/*.{pending.TABLES}")):
        epoch = pending.epoch_of(path)
        gathered[epoch] = (*gathered.get(epoch, ()), str(path.relative_to(root)))
    return gathered


def _counted(held: ModelState, plan: Plan, model: Model, folder: Path, store: Store) -> Counted:
    first, after = (plan.closed_before or 0) + 1, (plan.closed_after or 0) + 1
    opened = pending.pending_path(folder, model.name, "open", after, pending.RANGES)
    if opened.exists():
        paths = sorted(opened.parent.glob("closed-*"), key=pending.epoch_of)
        return Counted([(pending.epoch_of(path), _read(path)) for path in paths], _read(opened))
    before = store.read_ranges(held.open_hash)
    if plan.complete_through is None:
        return Counted([], before)
    # No record of the slice reached the judge: the open epoch closes with what it had. As many do
    # as the judge closes of a model with records; without any, a plan may cross any gap.
    newest = min(after - 1, first + (RING if plan.records else 1) - 1)
    nothing = before.emptied()
    later = [(epoch, nothing) for epoch in range(first + 1, newest + 1)]
    return Counted([(first, before), *later], nothing)


def _learned(
    before: Learned, counted: Counted, after: int, job: Job, acts: Sequence[Act]
) -> Learned:
    """What the next epoch is judged by."""
    # A slice keeps to one day, so it is all of one generation.
    epochs, counts = zip(*counted.closed, strict=True)
    learned = before.counted(epochs[0], reduce(close, counts))
    if job.calendar.generation(after) != job.calendar.generation(epochs[0]):
        learned = learned.at(after, job.policy.missing)
    for act in acts:
        learned = learned.acted(act, after)
        if not learned.acts[-1].done:
            report.not_done(act)
    return learned


def _totals(before: Learned, after: Learned, counted: Counted) -> Iterator[tuple[int, Ranges]]:
    """Every closed epoch, with what the one after it is judged by."""
    total = before.total
    for epoch, counts in counted.closed[:-1]:
        total = total if before.frozen else close(total, counts)
        yield epoch, total
    yield counted.closed[-1][0], after.total


def _shifted(
    shift: Shift, counted: Counted, plan: Plan, job: Job, model: Model
) -> tuple[Shift, tuple[RangeShift, ...]]:
    """After the closed epochs, and what is to be told of any of them."""
    news, rate = [], job.policy.asked_rate
    if rate is None:
        return Shift(), ()
    for epoch, counts in counted.closed:
        shift = after_epoch(shift, epoch, counts.judged, counts.flagged, rate)
        if shift.raised == epoch:
            news.append(_event(shift, rate, epoch, plan, job, model))
    return shift, tuple(news)


def _event(shift: Shift, rate: float, epoch: int, plan: Plan, job: Job, model: Model) -> RangeShift:
    partitions = [f"{each.id.source}/{each.id.partition}" for each in plan.after]
    named = (model.name, model.directions.hash, label(job.policy))
    return RangeShift(
        range_shift_id(partitions, *named, epoch),
        *named,
        rate,
        epoch if shift.since is None else shift.since,
        epoch,
        shift.judged,
        shift.flagged,
        (epoch + 1) * job.epoch_ms if job.dated else plan.clock_ms,
    )


def _read(path: Path) -> Ranges:
    ranges = Ranges.from_bytes(path.read_bytes())
    path.unlink()  # the state keeps it by its hash from here on
    return ranges


def _told(ranges_hash: str, job: Job, model: Model) -> str:
    """Names the rows of table `ranges` that say what conversations are judged by."""
    return combined_hash(
        {
            "ranges": ranges_hash,
            "policy": f"{label(job.policy)} {job.policy.settings}",
            "model": model.name,
        }
    )


def _untold(
    held: ModelState, closed: int, job: Job, model: Model, store: Store
) -> list[tuple[int, Ranges]]:
    """What the epoch after the closed one is judged by, if table `ranges` does not say so yet.

    So it is at the very beginning, of a model that has been added, and under another policy.
    """
    if held.told == _told(held.ranges_hash, job, model):
        return []
    return [(closed, store.read_ranges(held.ranges_hash))]


def _write_rows(
    judged_by: Iterable[tuple[int, Ranges]], opened: int, folder: Path, job: Job, model: Model
) -> None:
    """Leave rows of epochs; those of the one before `opened` wait for what is judged by them."""
    waiting = defaultdict(list)
    for epoch, ranges in judged_by:
        waiting[max(epoch, opened)].append(_rows(epoch, ranges, job, model))
    for epoch, tables in waiting.items():
        path = pending.pending_path(folder, model.name, RANGES, epoch, pending.TABLES)
        files.write_table(pa.concat_tables(tables), path)


def _rows(epoch: int, ranges: Ranges, job: Job, model: Model) -> pa.Table:
    counts = ranges.conversations
    return rows.ranges_table(
        epoch,
        epoch * job.epoch_ms if job.dated else None,
        ranges.hash,
        per_series(counts.stretches, counts.directions),
        counts.maximum,
        {name: counts.quantile_of_all(q) for name, q in _QUANTILES.items()},
        fitted.columns(job.policy, ranges),
        model.directions.entries,
        model.directions.hash,
    )
