"""Scoring in the memory there is: batches that do not fit are halved.

What the allocator refuses is told from what breaks the device. A kernel that kills the process
for want of memory, as Linux does where memory was promised that is not there, cannot be answered
here.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import RunFailedError, TransientError
from schemas.records import Int32s, Segments
from transforms.model.engine import ScoresBatches

_logger = logging.getLogger(__name__)

_REFUSED = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")
"""In what torch says where it has no class for it: CUDA, its CPU allocator, C++, cuBLAS."""

_BROKEN = ("CUDA error", "cuDNN error", "CUBLAS_STATUS_")

Rows = Sequence[tuple[Int32s, NDArray[np.int8]]]
"""Token ids and roles, per conversation."""


@dataclass(frozen=True)
class Part:
    """Conversations that went through the model together.

    Attributes:
      rows: which of the batch.
      scores: their segments, and bool [rows], whether all was finite; None: the one row does not
        fit into memory.
    """

    rows: range
    scores: tuple[Segments, NDArray[np.bool_]] | None


def score_what_fits(model: ScoresBatches, batch: Rows) -> Iterator[Part]:
    """Score a batch as a whole or, where it does not fit into memory, in halves of halves.

    Yields:
      Parts that together are the batch, in its order.

    Raises:
      TransientError: not even a single token fits; another process may have the memory.
      RunFailedError: the device is broken; only a new process can use it again.
    """
    waiting = [range(len(batch))]
    while waiting:
        rows = waiting.pop()
        scores = _attempt(model, batch[rows.start : rows.stop])
        if scores is None and len(rows) > 1:
            middle = (rows.start + rows.stop) // 2
            waiting += [range(middle, rows.stop), range(rows.start, middle)]
            continue
        if scores is None:
            _require_room(model, batch[rows.start])
        yield Part(rows, scores)


def _attempt(model: ScoresBatches, rows: Rows) -> tuple[Segments, NDArray[np.bool_]] | None:
    """Their scores; None where memory does not suffice."""
    try:
        return model.score([ids for ids, _ in rows], [roles for _, roles in rows])
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            _require_device(error)
            raise
        _logger.warning(
            "%d conversations of up to %d tokens do not fit into memory together; a smaller "
            "--batch-tokens would save the attempt",
            len(rows),
            max(len(ids) for ids, _ in rows),
        )
    # Only here has the error, and with it all the tensors its frames hold, been let go.
    torch.cuda.empty_cache()
    return None


def _require_room(model: ScoresBatches, row: tuple[Int32s, NDArray[np.int8]]) -> None:
    """Make sure that it is the conversation which does not fit, and that shorter ones would."""
    ids, roles = row
    if _attempt(model, [(ids[:1], roles[:1])]) is None:
        raise TransientError("no memory to score even one token; free some, or use a smaller model")


def _is_out_of_memory(error: Exception) -> bool:
    refused = any(words in str(error) for words in _REFUSED)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or refused


def _require_device(error: Exception) -> None:
    if isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in _BROKEN):
        reason = str(error).partition("\n")[0]
        raise RunFailedError(
            f"the device has failed ({reason}); start again, the slice is run again then"
        ) from error
