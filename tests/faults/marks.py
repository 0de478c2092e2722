"""Where a job is, kept in memory that outlives it: what a SIGKILL hit can be read afterwards."""

import functools
import mmap
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PLANNING = "planning"
READING = "reading and decoding"
SCORING = "scoring"
WRITING = "writing files"
SENDING = "sending alerts"
RUNNING = "between plan and commit"
COMMITTING = "committing"
ARCHIVING = "moving files into the archive"
PHASES = (PLANNING, READING, SCORING, WRITING, SENDING, RUNNING, COMMITTING, ARCHIVING)
"""What a kill is aimed at."""

WAITING = "between slices"
_NAMES = (WAITING, *PHASES)
_NOW = struct.Struct("=B")
_TARGET = struct.Struct("=BI")
_SPENT = struct.Struct("=Id")  # entrances, seconds
_TARGET_AT = 8
_SPENT_AT = 64


class Marks:
    """Shared by a job and the process that forked it. One job at a time.

    Attributes:
      rung: whether what was aimed at has been entered.
    """

    def __init__(self) -> None:
        self.rung = False
        self._memory = mmap.mmap(-1, 4096)
        self._bell, self._ring = os.pipe()

    @property
    def phase(self) -> str:
        """Where the job is, or was when it was killed."""
        return _NAMES[_NOW.unpack_from(self._memory, 0)[0]]

    def mean_seconds(self, phase: str) -> float:
        """How long a stay in a phase took on average, over all jobs so far."""
        entrances, seconds = self._spent(phase)
        return seconds / max(entrances, 1)

    def aim(self, phase: str, entrance: int) -> None:
        """Let it ring once the next job has entered a phase so many times."""
        self._memory[0], self.rung = 0, False
        until = self._spent(phase)[0] + entrance
        _TARGET.pack_into(self._memory, _TARGET_AT, _NAMES.index(phase), until)
        while self.rings(0):
            pass

    def rings(self, seconds: float) -> bool:
        """Wait for what was aimed at to be entered; whether it was."""
        if not select.select([self._bell], [], [], seconds)[0]:
            return False
        self.rung = bool(os.read(self._bell, 1))
        return self.rung

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Mark a phase of the job; the one around it comes back afterwards."""
        around, number = _NOW.unpack_from(self._memory, 0)[0], _NAMES.index(phase)
        _NOW.pack_into(self._memory, 0, number)
        entrances, seconds = self._spent(phase)
        _SPENT.pack_into(self._memory, _place(number), entrances + 1, seconds)
        if _TARGET.unpack_from(self._memory, _TARGET_AT) == (number, entrances + 1):
            os.write(self._ring, b"!")
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = seconds + time.perf_counter() - started
            _SPENT.pack_into(self._memory, _place(number), entrances + 1, spent)
            _NOW.pack_into(self._memory, 0, around)

    def during(self, phase: str, owner: Any, name: str) -> None:
        """Mark a phase whenever a function is called."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            with self.within(phase):
                return function(*arguments, **options)

        setattr(owner, name, marked)

    def while_iterating(self, phase: str, owner: Any, name: str) -> None:
        """Mark a phase of running from the first item of an iterator until the last is used."""
        function: Callable[..., Iterator[Any]] = getattr(owner, name)

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Iterator[Any]:
            with self.within(phase if self.phase == RUNNING else self.phase):
                yield from function(*arguments, **options)

        setattr(owner, name, marked)

    def _spent(self, phase: str) -> tuple[int, float]:
        entrances, seconds = _SPENT.unpack_from(self._memory, _place(_NAMES.index(phase)))
        return int(entrances), float(seconds)


def _place(number: int) -> int:
    return _SPENT_AT + 16 * number
