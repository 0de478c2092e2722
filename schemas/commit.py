"""The commit file: all that a restart needs to go on as if nothing had happened."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from schemas.acts import Act
from schemas.plan import PartitionProgress
from schemas.range_shift import RangeShift

FORMAT = 6
"""1 had neither `lost` in its ledgers nor `reasons` nor `committed_ms`; 2 held one model; 3 did not
say how long an epoch is, where conversations are cut, and which ranges a model began with; 4 knew
neither generations nor acts; 5 knew no accept that is taken back, and no act that was not done."""

UNNAMED = ""
"""The one model of a commit of format 1 or 2, which did not name it."""


@dataclass(frozen=True)
class Ledger:
    """What became of records. Balanced when every record seen is accounted for.

    Attributes:
      seen: counted by the source.
      scored: rows written to the archive's conversations table.
      dead_lettered: dead letters acknowledged.
      skipped: passed over with a reason (`SkipReason`).
      flagged: of the scored, those flagged.
      uncalibrated: of the scored, those without a calibrated judgement.
      alerts: alerts acknowledged.
      tokens: token positions that went through the model.
      lost: offsets that the log deleted before they were read; not among the seen.
    """

    seen: int = 0
    scored: int = 0
    dead_lettered: int = 0
    skipped: int = 0
    flagged: int = 0
    uncalibrated: int = 0
    alerts: int = 0
    tokens: int = 0
    lost: int = 0

    @property
    def balanced(self) -> bool:
        """Whether nothing is missing and nothing counted twice."""
        accounted = self.scored + self.dead_lettered + self.skipped
        return self.seen == accounted and self.flagged == self.alerts

    @property
    def flagged_share(self) -> float:
        """Of all conversations that were judged; 0 where none was."""
        return self.flagged / max(self.scored - self.uncalibrated, 1)

    def __add__(self, other: "Ledger") -> "Ledger":
        mine, theirs = asdict(self), asdict(other)
        return Ledger(**{name: mine[name] + theirs[name] for name in mine})

    def __str__(self) -> str:
        return (
            f"{self.seen} seen = {self.scored} scored + {self.dead_lettered} dead-lettered"
            f" + {self.skipped} skipped; {self.flagged} flagged, {self.alerts} alerts,"
            f" {self.uncalibrated} not calibrated"
            + (f"; {self.lost} deleted from the log before they were read" if self.lost else "")
        )


@dataclass(frozen=True)
class Shift:
    """Flagged conversations since there began to be far more of them than asked for.

    Attributes:
      since: first epoch with far more; None: there are not.
      judged: conversations since then.
      flagged: of these.
      beyond: how many of these are more than expected, from the last time on that none was; not
        counted on without end.
      raised: the epoch in which they became too many; None: they have not.
    """

    since: int | None = None
    judged: int = 0
    flagged: int = 0
    beyond: float = 0.0
    raised: int | None = None


@dataclass(frozen=True)
class ModelState:
    """What a commit holds of one model.

    Attributes:
      ranges_hash: of its ranges of closed epochs.
      open_hash: of its counts of the epoch after the closed one.
      ledger: its part of the total: `scored`, `flagged` and `uncalibrated`, and no more.
      base_hash: of the ranges that it began with; "": not known.
      generations: hashes of what its ranges are made of, by generation; without any, they are
        older than every epoch closed here.
      acts: what people did to its ranges, in the order in which it took effect.
      shift: whether normal traffic seems to have become another.
      news: shifts that were raised in the epochs which this commit closed.
      told: names what its newest rows in table `ranges` are of; "": there are none.
    """

    ranges_hash: str
    open_hash: str
    ledger: Ledger = field(default_factory=Ledger)
    base_hash: str = ""
    generations: Mapping[int, str] = field(default_factory=dict)
    acts: tuple[Act, ...] = ()
    shift: Shift = field(default_factory=Shift)
    news: tuple[RangeShift, ...] = ()
    told: str = ""

    @property
    def hashes(self) -> set[str]:
        """Of all ranges that it is made of."""
        accepted = {act.ranges_hash for act in self.acts if act.ranges_hash}
        return {self.ranges_hash, self.open_hash, *self.generations.values(), *accepted}


@dataclass(frozen=True)
class Commit:
    """State after a slice.

    Attributes:
      number: of the slice; 0 stands before the first.
      config_hash: of the configuration the slice ran under.
      progress: per partition, where reading goes on.
      closed_epoch: newest closed epoch; None: none yet.
      models: by name; also those that were judged once and are no longer.
      slice_ledger: what became of this slice's records.
      total_ledger: what became of all records since the state began.
      pending: per open epoch, its files not yet in the archive.
      to_archive: per closed epoch, the files to merge into the archive.
      reasons: why records of all slices were not scored, e.g. {"bad_json": 3}.
      committed_ms: when, in milliseconds since 1970 UTC; 0: not known.
      epoch_ms: length of the epochs that it numbers; 0: not known.
      max_tokens: where conversations are cut; 0: nowhere, or not known.
    """

    number: int
    config_hash: str
    progress: tuple[PartitionProgress, ...]
    closed_epoch: int | None
    models: Mapping[str, ModelState]
    slice_ledger: Ledger
    total_ledger: Ledger
    pending: dict[int, tuple[str, ...]]
    to_archive: dict[int, tuple[str, ...]]
    reasons: Mapping[str, int] = field(default_factory=dict)
    committed_ms: int = 0
    epoch_ms: int = 0
    max_tokens: int = 0

    @property
    def done(self) -> set[str]:
        """Ids of what people did."""
        return {act.id for held in self.models.values() for act in held.acts}

    def concerned(self, act: Act, judged: Sequence[str]) -> str | None:
        """Which of the models that are judged now an act is about; None: none of them any more.

        That is the one it names, or the only one where it has been renamed since.
        """
        if act.model in judged:
            return act.model
        renamed = len(judged) == 1 and act.model not in self.models
        return judged[0] if renamed else None

    def called(self, name: str) -> "Commit":
        """With this name for its model, where it has but one: names may have changed."""
        if len(self.models) != 1:
            return self
        return replace(self, models={name: next(iter(self.models.values()))})

    def to_json(self) -> dict[str, Any]:
        """As the commit file holds it."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Commit":
        """Read back what `to_json` wrote, now or in an older version.

        Raises ValueError for a format this version does not know.
        """
        if document["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"commit format {document['format']}, newer than {FORMAT}")
        fields = {name: value for name, value in document.items() if name != "format"}
        if document["format"] < 3:
            fields["models"] = {UNNAMED: _only_model(fields)}
        fields["models"] = {name: _model(held) for name, held in fields["models"].items()}
        fields["progress"] = tuple(map(PartitionProgress.from_json, document["progress"]))
        for name in ("slice_ledger", "total_ledger"):
            fields[name] = Ledger(**document[name])
        for name in ("pending", "to_archive"):
            fields[name] = {int(epoch): tuple(paths) for epoch, paths in document[name].items()}
        return Commit(**fields)


def _only_model(fields: dict[str, Any]) -> dict[str, Any]:
    """Take the one model of a former format out of its fields."""
    total = fields["total_ledger"]
    ledger = {name: total[name] for name in ("scored", "flagged", "uncalibrated")}
    hashes = {name: fields.pop(name) for name in ("ranges_hash", "open_hash")}
    return {**hashes, "ledger": ledger}


def _model(document: dict[str, Any]) -> ModelState:
    fields = {**document, "ledger": Ledger(**document["ledger"])}
    if "generations" in document:
        fields["generations"] = {int(day): held for day, held in document["generations"].items()}
        fields["acts"] = tuple(map(Act.from_json, document["acts"]))
        fields["shift"] = Shift(**document["shift"])
        fields["news"] = tuple(RangeShift(**each) for each in document["news"])
    return ModelState(**fields)
