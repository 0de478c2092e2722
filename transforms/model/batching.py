"""Which conversations go through the model together."""

from collections.abc import Iterator, Sequence

import torch


def default_tokens(device: torch.device) -> int:
    """How many tokens make a batch where nobody says it.

    What a CPU works on should stay in its caches; other devices want to be filled.
    """
    return 2048 if device.type == "cpu" else 4096


def batches(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """Group by length, so that little is padding and no batch is larger than asked.

    Args:
      lengths: of the conversations, in tokens.
      tokens: most in a batch with its padding; a longer conversation is a batch of its own.
      rows: most conversations in a batch.

    Yields:
      Indices into `lengths`, shortest first, those of one length in their order.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(batch)
        if size == rows or (size and (size + 1) * lengths[index] > tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
