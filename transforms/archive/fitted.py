"""A policy fitted to ranges as columns of table `ranges`, and read back to judge by it again.

The ranges themselves, megabytes of histograms an epoch, are not in the archive. What a verdict
takes of them is: a bound for every series and four numbers a role.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.artefacts import canonical_json
from schemas.errors import ConfigurationError
from schemas.records import ABSENT, STEPS_PER_UNIT, Int32s
from transforms.archive.rows import cosines
from transforms.ranges.policies import (
    POLICY_NAMES,
    Fitted,
    Policy,
    PolicySettings,
    label,
    make_policy,
)
from transforms.ranges.ranges import Ranges
from transforms.ranges.scores import BIN_WIDTH
from transforms.ranges.series import PER_DIRECTION, per_series

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A direction as the archive names it."""

    name: str
    layer: int
    kind: str
    index: int
    singular_value: float = float("nan")  # only the artefact has it


@dataclass(frozen=True, eq=False)
class Basis:
    """What conversations were judged by.

    Attributes:
      policy: decided.
      fitted: the same, fitted to the ranges. Series in which nothing was counted have no bound.
      directions: of the series, D.
      conversations: how many with a user, with an assistant, the ranges are of.
    """

    policy: Policy
    fitted: Fitted
    directions: tuple[Entry, ...]
    conversations: tuple[int, int]


def columns(policy: Policy, ranges: Ranges) -> dict[str, Any]:
    """Columns of table `ranges`, 4 * D places each: what conversations are judged by next."""
    fitted, counts = policy.fit(ranges), ranges.conversations
    directions, series = counts.directions, PER_DIRECTION * counts.directions
    known = per_series(np.array(fitted.known, np.int64), directions) > 0
    empty = per_series(counts.stretches, directions) == 0
    return {
        "policy": [label(policy)] * series,
        "settings": [canonical_json(asdict(policy.settings)).decode()] * series,
        "bound": cosines(_signs(series) * fitted.bounds, empty & ~known),
        "known": known,
        "threshold": _spread(fitted.thresholds, directions),
        "handicap": _spread([BIN_WIDTH * bins for bins in fitted.handicaps], directions),
        "window": _spread(fitted.windows, directions),
    }


def basis(rows: pa.Table) -> Basis:
    """What the rows of an epoch, 4 * D of them in stored order, say.

    Raises:
      ConfigurationError: by a version or a policy that this version cannot go by.
    """
    roles = rows.take([0, len(rows) // PER_DIRECTION]).to_pylist()  # the same in all its series
    policy = _policy(roles[0]["policy"], roles[0]["settings"])
    handicaps = (_steps(role["handicap"]) or 0 for role in roles)
    windows = (_steps(role["window"]) or 0 for role in roles)
    fitted = Fitted(
        _bounds(rows["bound"]),
        _pair(role["known"] for role in roles),
        _pair(_steps(role["threshold"]) for role in roles),
        policy.rule,
        _pair(steps // BIN_WIDTH for steps in handicaps),
        _pair(windows),
        policy.whole,
    )
    return Basis(policy, fitted, _entries(rows), _pair(role["n"] for role in roles))


def _pair(values: Iterable[_T]) -> tuple[_T, _T]:
    user, assistant = values
    return user, assistant


def _signs(series: int) -> NDArray[np.int64]:
    """Of values as cosines: series of the low side hold them negated."""
    return np.repeat([1, -1], series // 2)


def _spread(steps: Sequence[int | None], directions: int) -> pa.Array:
    """Of either role, over all its series."""
    values = np.array([each or 0 for each in steps], np.int64)
    missing = np.array([each is None for each in steps], np.int64)
    return cosines(per_series(values, directions), per_series(missing, directions) > 0)


def _steps(cosine: float | None) -> int | None:
    return None if cosine is None else round(cosine * STEPS_PER_UNIT)


def _bounds(column: pa.ChunkedArray) -> Int32s:
    cosine = pc.fill_null(column, 0).to_numpy().astype(np.float64)
    bounds = _signs(len(column)) * np.rint(cosine * STEPS_PER_UNIT).astype(np.int32)
    return np.where(pc.is_null(column).to_numpy(), ABSENT, bounds).astype(np.int32)


def _entries(rows: pa.Table) -> tuple[Entry, ...]:
    first = rows.slice(0, len(rows) // PER_DIRECTION)
    names = (first[name].to_pylist() for name in ("direction", "layer", "kind", "rank_index"))
    return tuple(Entry(*of) for of in zip(*names, strict=True))


def _policy(named: str | None, settings: str | None) -> Policy:
    if named is None or settings is None:
        raise ConfigurationError(
            "the archive does not say what the ranges became by the policy: an older version wrote "
            "it, and what it judged cannot be recomputed"
        )
    name = named.partition("/")[0]
    if name not in POLICY_NAMES or label(make_policy(name, PolicySettings())) != named:
        raise ConfigurationError(
            f"the verdict is by policy {named}, which this version does not have; use the version "
            f"that judged (the archive's files name it: deltawatch.tool_version)"
        )
    try:
        return make_policy(name, PolicySettings(**json.loads(settings)))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"settings {settings!r} in table ranges are not those of {named} ({error}); restore "
            f"the archive's files"
        ) from None
