"""Growth is told from noise, also from noise that neighbouring samples share."""

import numpy as np
import pytest
from slopes import slope

AT = np.arange(0, 20 * 60, 5.0)
HOURS = AT / 3600


def noise(kind: str, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    if kind == "white":
        return chance.normal(0, 2, len(AT))
    if kind == "sawtooth":  # files of an epoch of half a minute, then none
        return 10 * (AT % 30) / 30 + chance.normal(0, 0.5, len(AT))
    wandering = np.zeros(len(AT))
    for n in range(1, len(AT)):
        wandering[n] = 0.9 * wandering[n - 1] + chance.normal()
    return wandering


@pytest.mark.parametrize("kind", ["white", "sawtooth", "wandering"])
def test_noise_does_not_grow(kind: str) -> None:
    flat = [slope(AT, 800 + noise(kind, seed)).flat for seed in range(200)]
    assert all(flat)


@pytest.mark.parametrize("kind", ["white", "sawtooth", "wandering"])
def test_a_leak_is_seen_through_the_noise(kind: str) -> None:
    leaks = [slope(AT, 800 + 60 * HOURS + noise(kind, seed)) for seed in range(200)]
    assert np.mean([found.flat for found in leaks]) < 0.05
    assert np.mean([found.per_hour for found in leaks]) == pytest.approx(60, rel=0.1)


def test_a_line_is_measured_as_it_is_and_less_is_not_growth() -> None:
    found = slope(AT, 100 - 30 * HOURS)
    assert (found.per_hour, found.error) == pytest.approx((-30, 0), abs=1e-9)
    assert found.flat
