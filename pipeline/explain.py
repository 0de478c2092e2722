"""What was found in every matrix, as a table for a person."""

from collections.abc import Iterator

import numpy as np

from transforms.model.directions import matrix_name
from transforms.model.writers import LeftSingular, Writer

VALUES = 4
"""Singular values shown of every matrix."""

UNUSUAL = 0.5
"""Change of a matrix, in units of its length, from which on a tuning is doubted.

Two unrelated matrices of one size differ by 1.4 times their length.
"""

_HEAD = f"{'layer':>5}  {'kind':<10}{'rank':>5}  {'largest singular values':<40}"
_HEAD += f"{'captured':>9}{'of all':>9}{'changed':>9}"


class Table:
    """Collects what is found; see `lines`."""

    def __init__(self) -> None:
        """Begin without a matrix."""
        self._found: list[tuple[Writer, LeftSingular]] = []

    def add(self, writer: Writer, found: LeftSingular) -> None:
        """Note what was found in a matrix."""
        self._found.append((writer, found))

    def fallbacks(self) -> list[str]:
        """Names of the matrices that LAPACK had to decompose."""
        return [matrix_name(writer) for writer, found in self._found if found.fallback]

    def lines(self) -> Iterator[str]:
        """A row per matrix, what the columns mean, and a warning where there is reason for one."""
        whole = sum(found.energy for _, found in self._found) or 1.0
        yield _HEAD
        for writer, found in self._found:
            yield _row(writer, found, whole)
        yield "captured: share of the matrix's difference that lies along the directions kept"
        yield "of all: share of the whole difference that lies in the matrix (both of energy)"
        yield "changed: length of the difference over that of the base's matrix"
        yield from self._warnings()

    def _warnings(self) -> Iterator[str]:
        changes = [found.change for _, found in self._found if found.change is not None]
        unusual = sum(change > UNUSUAL for change in changes)
        if unusual:
            yield (
                f"WARNING: {unusual} of {len(changes)} matrices changed by more than {UNUSUAL:.0%} "
                f"of their length (at most {max(changes):.0%}): the tuned model hardly descends "
                "from this base; what is monitored then is how two models differ, not a tuning"
            )


def _row(writer: Writer, found: LeftSingular, whole: float) -> str:
    values = " ".join(f"{value:9.3g}" for value in found.values[:VALUES])
    changed = "" if found.change is None else _share(found.change)
    return (
        f"{writer.layer:>5}  {writer.kind:<10}{len(found.values):>5}  {values:<40}"
        f"{_share(found.captured):>9}{_share(found.energy / whole):>9}{changed:>9}"
    )


def _share(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "new"
