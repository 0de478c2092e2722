"""The bench of range keeping, on little traffic."""

import json

import numpy as np
import pytest

from bench import ranges
from bench.made_up import Traffic
from schemas.records import STEPS_PER_UNIT, Segments
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import Stretches

DIRECTIONS = 3


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return Traffic(DIRECTIONS)


def test_conversations_have_three_or_four_segments_in_turns(traffic: Traffic) -> None:
    packs = traffic.packs(100, 32)
    assert [pack.conversations for pack in packs] == [32, 32, 32, 4]
    assert [pack.conversations for pack in traffic.packs(64, 32)] == [32, 32]
    for pack in packs:
        for row in range(pack.conversations):
            assert pack.role[pack.row == row].tolist() in ([0, 1, 0], [0, 1, 0, 1])


def test_cosines_are_spread_as_is_said() -> None:
    values = Traffic(200).values(np.zeros(5000, np.int8)) / STEPS_PER_UNIT
    assert values.mean() == pytest.approx(0.062, abs=0.01)
    assert np.median(values.std(axis=0)) == pytest.approx(0.019, rel=0.1)
    apart = (values - values.mean(axis=0)) / values.std(axis=0)
    assert np.quantile(apart, 1 - 1e-4) == pytest.approx(5.6, abs=0.3)


def test_a_month_closes_epochs_into_days(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "EPOCHS_A_DAY", 2)
    month, packs = ranges.Month(DIRECTIONS), [traffic.pack(8) for _ in range(10)]
    for place in range(0, 10, 2):
        month.count(packs[place : place + 2])
        month.close()
    empty = Ranges.empty(DIRECTIONS, "d" * 64, "made-up")

    def of(some: list[Segments]) -> str:
        ranges = empty
        for pack in some:
            ranges = ranges.plus(Stretches.of(pack))
        return ranges.hash

    # Five epochs: two days and the first epoch of a third.
    assert (month.total.hash, month.day.hash) == (of(packs), of(packs[8:]))
    assert month.opened.hash == empty.hash
    total, day, opened = month.sizes()
    assert total > day > opened


def test_everything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--conversations=200", "--epoch=10", "--pack=4", "--values=3000"]
    ranges.main([*options, f"--directions={DIRECTIONS}"])
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["conversations"] == 200
    assert figures["conversations_per_s"] > 0
    assert figures["state_bytes"] > figures["commit_bytes"] > figures["generation_bytes"] > 0
    # Promised is 0.001, and kept in every order.
    assert figures["counts_off_at_999"] <= 0.001
    (counts,) = [line.split() for line in lines if line.startswith("counts ")]
    assert counts[-3:] == ["yes"] * 3
    (sketch,) = [line.split() for line in lines if line.startswith("KLL 200 ")]
    assert sketch[-1] == "no"
