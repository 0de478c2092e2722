"""Policies by name. A new one is a module here and a row in `_POLICIES`."""

from collections.abc import Callable
from typing import Final

from schemas.errors import ConfigurationError
from transforms.ranges.fitted import Fitted, Judgements
from transforms.ranges.policies.base import Missing, Policy, PolicySettings, label
from transforms.ranges.policies.budget import SCORE_RULE, BudgetPolicy
from transforms.ranges.policies.extremes import ExtremesPolicy
from transforms.ranges.policies.percentile import PercentilePolicy

__all__ = [
    "DEFAULT_POLICY",
    "POLICY_NAMES",
    "SCORE_RULE",
    "Fitted",
    "Judgements",
    "Missing",
    "Policy",
    "PolicySettings",
    "label",
    "make_policy",
]

_POLICIES: Final[dict[str, Callable[[PolicySettings], Policy]]] = {
    BudgetPolicy.name: BudgetPolicy,
    PercentilePolicy.name: PercentilePolicy,
    ExtremesPolicy.name: ExtremesPolicy,
}

POLICY_NAMES: Final = tuple(_POLICIES)
DEFAULT_POLICY: Final = BudgetPolicy.name


def make_policy(name: str, settings: PolicySettings) -> Policy:
    """The policy of this name. Raises ConfigurationError when there is none."""
    if name not in _POLICIES:
        raise ConfigurationError(f"no policy {name!r}; use one of {', '.join(POLICY_NAMES)}")
    return _POLICIES[name](settings)
