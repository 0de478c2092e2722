"""A job runs for months: nothing of a slice may stay in the process once it is committed."""

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import traffic
from cheap_job import cheap_job

from pipeline.slices import Slices
from pipeline.state import State

SLICES = 5


def test_no_object_of_a_slice_stays(
    conversations: list[dict[str, Any]],
    base_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)  # what is captured would stay
    log = traffic.to_files(tmp_path / "log", traffic.records(conversations[:80]))
    job = cheap_job(base_model, (log,), tmp_path, epoch_ms=10**14, slice_records=5)
    state = State(tmp_path / "state")
    slices = Slices(job, state)
    counted = [_objects_after(slices) for _ in range(3 * SLICES)][SLICES:]  # caches fill at first
    state.close()
    # Beam's map of shared objects alone would add six a slice; caches still fill a little, and now
    # and then something else in the process holds some for a moment.
    assert min(counted[SLICES:]) - min(counted[:SLICES]) < 3 * SLICES


def _objects_after(slices: Slices) -> int:
    assert slices.step()
    gc.collect()
    return len(gc.get_objects())
