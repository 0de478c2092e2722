"""Runs slices one after another: to the end of the logs, or for ever until told to stop.

A broker that is away, a disk that is full: what fails for a reason outside is tried again from
the newest commit, which is the same as a restart but keeps the model loaded.
"""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from pipeline import report
from pipeline.metrics import Health
from pipeline.slices import Slices
from schemas.commit import Commit
from schemas.errors import RunFailedError, TransientError

PERIOD_SECONDS = 1
"""From the start of one slice of `watch` to that of the next, at least: a commit has its price."""

PAUSES = (1, 2, 5, 10)
"""Seconds before the first, second, ... repetition; the last one from then on."""


@dataclass
class Follow:
    """How slices are run.

    Attributes:
      endless: wait for more when the logs have been read.
      patience_s: how long failures may go on, in seconds, before the run is given up.
      stop: set it to end after the slice at hand.
      health: told about every turn.
    """

    endless: bool
    patience_s: float
    stop: threading.Event = field(default_factory=threading.Event)
    health: Health = field(default_factory=Health)

    def stop_on_signals(self) -> None:
        """End in order at the first SIGTERM or Ctrl-C, at once at the second."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked_to_stop)

    def require_end(self) -> None:
        """Raises RunFailedError where a signal came before the logs had been read."""
        if self.stop.is_set():
            raise RunFailedError("stopped before the end; the same command goes on from there")

    def run(self, start: Callable[[], Slices]) -> Commit:
        """Run slices; `start` takes them up from the newest commit. Returns the last commit.

        Raises:
          RunFailedError: the run cannot be trusted, or failures went on for too long.
          ConfigurationError: the state is not one that can be gone on with.
        """
        slices, failures = start(), _Failures(self.patience_s)
        while not self.stop.is_set():
            try:
                # Nothing of a failed turn is kept: what counts is what reached the disk.
                slices = start() if failures.count else slices
                went_on = self._turn(slices)
                failures = _Failures(self.patience_s)
            except (TransientError, OSError) as error:  # OSError: the disk of state or archive
                self._wait_out(failures, error)
                continue
            if not went_on and not self.endless:
                break
        return slices.commit

    def _turn(self, slices: Slices) -> bool:
        """One slice; whether there was anything to read."""
        started = time.monotonic()
        commit = slices.step()
        lags = slices.lags()
        self.health.turned(slices.commit, lags, slices.missing())
        if commit is not None:
            report.slice_done(commit, sum(lags.values()), time.monotonic() - started)
        if commit is not None and commit.to_archive:
            report.epochs_closed(commit, slices.ranges(), slices.missing())
        if self.endless:
            self.stop.wait(started + PERIOD_SECONDS - time.monotonic())
        return commit is not None

    def _wait_out(self, failures: "_Failures", error: TransientError | OSError) -> None:
        pause = failures.pause(error)
        self.health.failed(str(error))
        report.trying_again(error, pause)
        self.stop.wait(pause)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop.set()
        signal.signal(number, signal.SIG_DFL)


@dataclass
class _Failures:
    """Failures in a row."""

    patience_s: float
    count: int = 0
    since: float = field(default_factory=time.monotonic)

    def pause(self, error: TransientError | OSError) -> float:
        """Seconds to wait now. Raises RunFailedError once patience has run out."""
        if self.count == 0:
            self.since = time.monotonic()
        if time.monotonic() - self.since > self.patience_s:
            raise RunFailedError(str(error)) from error
        self.count += 1
        return PAUSES[min(self.count, len(PAUSES)) - 1]
