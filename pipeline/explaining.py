"""The `explain` command: what a verdict rests on, recomputed from the archive alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.arrow import CONVERSATIONS
from schemas.errors import ConfigurationError
from schemas.records import ABSENT, STEPS_PER_UNIT, Exceedance, Judgement, Role
from schemas.text import printable
from transforms.archive import lookup, recompute
from transforms.archive.fitted import Basis, basis
from transforms.archive.lookup import Place
from transforms.archive.recompute import Difference
from transforms.ranges.policies import Judgements

SHORTEST = 8
"""Characters of an alert's id that have to be given."""

_SHOWN = 10
_HEAD = f"  {'direction':<12}{'layer':>5}  {'role':<11}{'side':<6}{'value':>9}{'bound':>9}"
_HEAD += f"{'margin':>9}  tokens"


@dataclass(frozen=True, eq=False)
class Explanation:
    """A verdict of the archive, and the same made again.

    Attributes:
      place: of the conversation.
      row: of table `conversations`, without its vectors.
      basis: what it was judged by.
      judgements: of it alone.
      differences: between the archive and what was recomputed.
    """

    place: Place
    row: Mapping[str, Any]
    basis: Basis
    judgements: Judgements
    differences: Sequence[Difference]

    @property
    def reproduced(self) -> bool:
        """Whether the archive holds exactly what was recomputed."""
        return not self.differences

    def lines(self) -> Iterator[str]:
        """For a person; the last one says whether it was reproduced."""
        yield from self._heading()
        yield from (self._score(role) for role in Role)
        yield from self._exceedances()
        if self.reproduced:
            yield "reproduced"
        else:
            yield f"NOT reproduced: {'; '.join(map(_difference, self.differences))}"

    def _heading(self) -> Iterator[str]:
        row, position = self.row, self.place.position
        user, assistant = self.basis.conversations
        time = row["event_time"] or row["effective_time"]
        yield f"alert {self.place.alert}" if self.place.alert else "no alert"
        yield (
            f"conversation {printable(row['conversation_id'])} of model "
            f"{printable(self.place.model)}: {row['status']}"
        )
        yield (
            f"  log {printable(position.source)} partition {position.partition} offset "
            f"{position.offset}; {time.isoformat(timespec='seconds') if time else 'no time'}; "
            f"{row['tokens']} tokens{', cut there' if row['truncated'] else ''}"
        )
        yield f"  policy {row['policy']}, {self._asked()}"
        yield (
            f"  calibrated on {user:,} conversations with a user, {assistant:,} with an assistant; "
            f"ranges {row['ranges_hash']}"
        )

    def _asked(self) -> str:
        rate = self.basis.policy.asked_rate
        return "no rate asked for" if rate is None else f"at most {rate:.2%} of normal traffic"

    def _score(self, role: Role) -> str:
        name, limit = f"  {role.name.lower()}:", self.judgements.thresholds[role]
        score = int(self.judgements.role_scores[0, role])
        highest = int(self.judgements.highest[0, role])
        threshold = "not calibrated" if limit is None else f"threshold {_cosine(limit)}"
        if score == ABSENT:
            return f"{name} no score, {threshold}"
        less = f" ({_cosine(highest)} less {_cosine(highest - score)} for its length)"
        over = ", above it" if self.judgements.over[0, role] else ""
        return f"{name} score {_cosine(score)}{less if highest > score else ''}, {threshold}{over}"

    def _exceedances(self) -> Iterator[str]:
        found = self._judgement.exceedances
        if found:
            yield _HEAD
        yield from map(self._exceedance, found[:_SHOWN])
        if len(found) > _SHOWN:
            yield f"  ... and {len(found) - _SHOWN} more in table exceedances"

    def _exceedance(self, found: Exceedance) -> str:
        direction = self.basis.directions[found.direction]
        value, bound, margin = (
            f"{steps / STEPS_PER_UNIT:+.4f}" for steps in (found.value, found.bound, found.margin)
        )
        return (
            f"  {printable(direction.name):<12}{direction.layer:>5}  {found.role.name.lower():<11}"
            f"{found.side:<6}{value:>9}{bound:>9}{margin:>9}  [{found.token}, {found.token + 1})"
        )

    @cached_property
    def _judgement(self) -> Judgement:
        (judgement,) = self.judgements.records()
        return judgement


def explain(archive: Path, named: str) -> list[Explanation]:
    """Recompute the verdicts that an alert's id, its beginning, or a conversation's id names.

    Several, where the same record was judged more than once.

    Raises:
      ConfigurationError: there is none, or it cannot be recomputed from this archive.
    """
    if not (archive / CONVERSATIONS).is_dir():
        raise ConfigurationError(
            f"{archive} has no table {CONVERSATIONS}; give the --archive of `watch` or `audit`"
        )
    try:
        return [_explanation(place) for place in _found(archive, named)]
    except (OSError, ValueError, pa.ArrowException) as error:  # a file, or what stands in it
        raise ConfigurationError(
            f"{archive} cannot be read ({str(error).splitlines()[0]}); restore its files"
        ) from None


def _found(archive: Path, named: str) -> list[Place]:
    places = lookup.find(archive, named)
    if not places:
        raise ConfigurationError(
            f"no alert or conversation {named!r} in {archive}; look at the id again (an alert's is "
            f"its `finding_info.uid`), or wait: rows appear once their epoch has closed"
        )
    if all(place.conversation_id == named for place in places):
        return places
    if len(named) < SHORTEST or len({place.alert for place in places}) > 1:
        raise ConfigurationError(
            f"{named!r} is the beginning of {len(places)} alerts' ids in {archive}; give more of "
            f"it, {SHORTEST} characters at least"
        )
    return places


def _explanation(place: Place) -> Explanation:
    conversation = place.conversation()
    (row,) = conversation.drop_columns(_vectors(conversation.schema)).to_pylist()
    exceedances = place.exceedances()
    judged = place.ranges(conversation)
    if not judged:
        raise ConfigurationError(
            f"the archive has no ranges {row['ranges_hash']} of model {place.model!r} by policy "
            f"{row['policy']} before epoch {row['epoch']}; restore its table ranges"
        )
    # The settings may have been changed within an epoch: the verdict is by one of them.
    for by in map(basis, judged):
        judgements = recompute.judge(conversation, by)
        differences = recompute.differences(conversation, exceedances, judgements.records()[0], by)
        explanation = Explanation(place, row, by, judgements, differences)
        if explanation.reproduced:
            break
    return explanation


def _vectors(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_nested(field.type)]


def _difference(found: Difference) -> str:
    archived, recomputed = _shown(found.archived), _shown(found.recomputed)
    return f"{found.what} differs (archive {archived}, recomputed {recomputed})"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.9g}" if isinstance(value, float) else printable(str(value))


def _cosine(steps: int) -> str:
    return f"{steps / STEPS_PER_UNIT:.4f}"
