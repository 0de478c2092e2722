"""When the share of flagged conversations says that normal traffic has become another.

A policy that keeps a rate flags more than that for a while now and then. It goes on doing so when
traffic has changed for good, or when someone floods it. Either way a person has to look. The rule
is a cumulative sum (Page 1954, "Continuous inspection schemes"): of the flagged conversations of
every closed epoch FAR times as many as asked for are expected, and what is left over is added up,
from the last time on that nothing was. At LIMIT it is too much.
"""

from dataclasses import replace
from typing import Final

from schemas.commit import Shift

FAR: Final = 3
LIMIT: Final = 20
"""Flagged conversations beyond those expected. Where the rate is kept within a factor of two,
chance gets so far less than once in a million times that the sum leaves 0 (Poisson counts)."""

MOST: Final = 2 * LIMIT
"""More is not added up, so that a long shift is over soon after the last of it."""

_DIGITS: Final = 9
"""Sums are rounded to so many, so that they are those of decimal numbers."""


def after_epoch(shift: Shift, epoch: int, judged: int, flagged: int, rate: float) -> Shift:
    """What a closed epoch makes of it.

    Args:
      shift: before it.
      epoch: its number.
      judged: conversations that were flagged or found clean in it.
      flagged: of these.
      rate: asked for.
    """
    beyond = round(shift.beyond + flagged - FAR * rate * judged, _DIGITS)
    if beyond <= 0:
        return Shift()
    is_news = beyond >= LIMIT and shift.raised is None
    return replace(
        shift,
        since=epoch if shift.since is None else shift.since,
        judged=shift.judged + judged,
        flagged=shift.flagged + flagged,
        beyond=min(beyond, float(MOST)),
        raised=epoch if is_news else shift.raised,
    )
