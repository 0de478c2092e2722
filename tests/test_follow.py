"""The loop around slices: patience with what fails outside, none with what cannot be trusted."""

import threading
from collections.abc import Callable, Sequence

import pytest

from pipeline import follow
from pipeline.follow import Follow
from schemas.commit import Commit, Ledger
from schemas.errors import RunFailedError, TransientError

Turn = Exception | None
"""What a slice raises; None: it goes well."""


def commit(number: int) -> Commit:
    return Commit(number, "", (), None, {}, Ledger(), Ledger(), {}, {})


class Script:
    """Stands for slices on a state: turns that go as written, commits that outlive them."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = list(turns)
        self.commit = commit(0)
        self.starts = 0

    def start(self) -> "Script":
        self.starts += 1
        return self

    def step(self) -> Commit | None:
        if not self.turns:
            return None
        turn = self.turns.pop(0)
        if turn is not None:
            raise turn
        self.commit = commit(self.commit.number + 1)
        return self.commit

    def lags(self) -> dict[str, int]:
        return {}

    def missing(self) -> dict[str, tuple[int, int]]:
        return {"a-model": (0, 7)}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PAUSES", (0.01, 0.02))


def run(*turns: Turn, patience: float = 5) -> tuple[Script, Follow]:
    script, loop = Script(turns), Follow(False, patience)
    assert loop.run(script.start) is script.commit  # type: ignore[arg-type]
    return script, loop


def test_slices_run_to_the_end_of_the_logs() -> None:
    script, loop = run(None, None, None)
    assert (script.commit.number, script.starts) == (3, 1)
    assert loop.health.failing is None
    assert loop.health.missing == {"a-model": (0, 7)}


def test_what_fails_outside_is_taken_up_anew_from_the_newest_commit() -> None:
    away, full = TransientError("the broker is away"), OSError(28, "No space left on device")
    script, loop = run(None, away, away, None, full, None)
    assert script.commit.number == 3
    assert script.starts == 1 + 3, "a start anew after every failure"
    assert loop.health.failures == 3
    assert loop.health.failing is None


def test_patience_runs_out_over_failures_in_a_row_only() -> None:
    away: list[Turn] = [TransientError("the broker is away")] * 6
    with pytest.raises(RunFailedError, match="the broker is away"):
        run(*away, patience=0.05)
    spread = [each for pair in zip(away, [None] * 6, strict=True) for each in pair]
    assert run(*spread, patience=0.05)[0].commit.number == 6


def test_counts_that_do_not_add_up_end_a_run_at_once() -> None:
    with pytest.raises(RunFailedError, match="does not add up"):
        run(None, RunFailedError("slice 2 does not add up"), None)


def test_a_run_that_waits_for_a_broker_can_be_stopped() -> None:
    loop = Follow(True, 60)
    script = Script([TransientError("away")] * 1000)
    threading.Timer(0.2, loop.stop.set).start()
    done = _within(5, lambda: loop.run(script.start))  # type: ignore[arg-type]
    assert done
    assert loop.health.failing == "away"


def _within(seconds: float, action: Callable[[], object]) -> bool:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
