"""How a model's ranges change with a slice: by what was counted, what expires, what people do.

Everything in them is of a generation (see `transforms.ranges.generations`) or was accepted by a
person; both are kept by themselves, so that either can be left out again.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Final, Protocol

from schemas.acts import Act, ActKind
from schemas.commit import ModelState
from transforms.ranges.generations import Calendar
from transforms.ranges.policies import Missing
from transforms.ranges.ranges import Ranges, close

LONGEST: Final = 12
"""How many times as long as others days stay that a role needs which is not calibrated yet."""

MissingIn = Callable[[Ranges], Missing]
"""How many conversations ranges lack; see `Policy.missing`."""


class Store(Protocol):
    """Keeps ranges by their hash."""

    def read_ranges(self, digest: str) -> Ranges:
        """Ranges kept under this hash."""

    def write_ranges(self, ranges: Ranges) -> str:
        """Keep ranges under their hash; returns it."""


@dataclass(frozen=True)
class Learned:
    """Ranges of closed epochs, and what they are made of. A change is a new object.

    Attributes:
      total: what is judged by.
      store: has the parts.
      calendar: which generation an epoch is of.
      generations: hashes of its generations; none yet: all is older than any epoch counted.
      acts: what people did to it, in order.
    """

    total: Ranges
    store: Store
    calendar: Calendar
    generations: Mapping[int, str] = field(default_factory=dict)
    acts: tuple[Act, ...] = ()

    @staticmethod
    def of(held: ModelState, store: Store, calendar: Calendar) -> "Learned":
        """What a state holds of a model."""
        total = store.read_ranges(held.ranges_hash)
        return Learned(total, store, calendar, held.generations, held.acts)

    @property
    def frozen(self) -> bool:
        """Whether nothing is learnt."""
        return frozen(self.acts)

    def counted(self, epoch: int, counts: Ranges) -> "Learned":
        """With what was counted in an epoch."""
        if self.frozen or counts.is_empty:
            return self
        number = self.calendar.generation(epoch)
        generations = dict(self.generations) or self._begun(number)
        before = generations.get(number)
        mine = counts if before is None else close(self.store.read_ranges(before), counts)
        generations[number] = self.store.write_ranges(mine)
        return replace(self, total=close(self.total, counts), generations=generations)

    def at(self, epoch: int, missing_in: MissingIn) -> "Learned":
        """Without the generations that have expired when an epoch begins.

        They stay, the newest of them first, where a role that can be judged could not be without
        them: nobody is to lose the monitor by being on holiday, or by having little traffic. For a
        role that is still waiting for enough conversations they stay LONGEST times as long.
        """
        expired = self.calendar.expired(self.generations, epoch)
        if self.frozen or not expired:
            return self
        kept = [number for number in self.generations if number not in expired]
        total, before = self._of(kept), missing_in(self.total)
        oldest = self.calendar.generation(epoch) - LONGEST * self.calendar.kept
        while expired and _is_worse(missing_in(total), before, expired[-1] >= oldest):
            kept.append(expired.pop())
            total = close(total, self.store.read_ranges(self.generations[kept[-1]]))
        return self._with(kept, total)

    def acted(self, act: Act, epoch: int) -> "Learned":
        """With what a person did; `epoch` is the first that is judged by it.

        A rollback to a day of which nothing is left (it may have expired since it was asked for) is
        noted as not done: nobody means to lose all ranges by it.
        """
        generations = dict(self.generations) or self._begun(self.calendar.generation(epoch))
        left = [number for number in generations if _stays(number, act)]
        act = replace(act, epoch=epoch, done=bool(left) or act.kind is not ActKind.ROLLBACK)
        learned = replace(self, generations=generations, acts=(*self.acts, act))
        if act.kind is ActKind.ACCEPT:
            return replace(learned, total=learned._accepting(self.total, [act.ranges_hash]))
        if act.kind is ActKind.REVOKE or (act.kind is ActKind.ROLLBACK and act.done):
            return learned._with(left)
        return learned

    def _begun(self, number: int) -> dict[int, str]:
        """What there was before the first generation, as one of the day before it.

        After an act there is nothing to begin with: it began them, and what is in the ranges all
        the same was accepted.
        """
        if self.acts or self.total.is_empty:
            return {}
        return {number - 1: self.store.write_ranges(self.total)}

    def _with(self, numbers: Iterable[int], total: Ranges | None = None) -> "Learned":
        generations = {number: self.generations[number] for number in sorted(numbers)}
        learned = replace(self, generations=generations)
        return replace(learned, total=total or learned._of(generations))

    def _of(self, numbers: Iterable[int]) -> Ranges:
        parts = (self.store.read_ranges(self.generations[number]) for number in numbers)
        total = reduce(close, parts, self.total.emptied())
        kept = accepted(self.acts, self.calendar)
        return self._accepting(total, [act.ranges_hash for act in kept])

    def _accepting(self, total: Ranges, digests: Iterable[str]) -> Ranges:
        for digest in digests:
            total = total.accepting(self.store.read_ranges(digest))
        return total


def frozen(acts: Iterable[Act]) -> bool:
    """Whether the latest of `freeze` and `thaw` is a freeze."""
    kinds = [act.kind for act in acts if act.kind in (ActKind.FREEZE, ActKind.THAW)]
    return kinds[-1:] == [ActKind.FREEZE]


def accepted(acts: Iterable[Act], calendar: Calendar) -> list[Act]:
    """What was accepted, not revoked, and not undone by a later rollback to a day before it.

    What waits counts as accepted now.
    """
    found: list[Act] = []
    for act in acts:
        if act.kind is ActKind.ACCEPT:
            found.append(act)
        elif act.kind is ActKind.REVOKE:
            found = [each for each in found if each.id != act.revoked]
        elif act.kind is ActKind.ROLLBACK and act.done:
            found = [
                each
                for each in found
                if each.epoch is None or _stays(calendar.generation(each.epoch), act)
            ]
    return found


def _stays(generation: int, act: Act) -> bool:
    """Whether an act leaves what is of a generation."""
    return act.generation is None or generation <= act.generation


def _is_worse(missing: Missing, before: Missing, waiting: bool) -> bool:
    """Whether a role lacks more than before; of those that were not calibrated, if they may."""
    pairs = zip(missing, before, strict=True)
    return any(now > then and (waiting or not then) for now, then in pairs)
