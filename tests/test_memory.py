"""What happens when memory does not suffice: allocations that really fail, at a known size."""

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
import torch
from cheap_scorer import CheapScorer
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import RunFailedError, TransientError
from schemas.records import Segments
from transforms.model.batching import batches, default_tokens
from transforms.model.memory import score_what_fits

CHEAP = CheapScorer(3, seed=1)
Scores = tuple[Segments, np.ndarray]


def refused_by_the_allocator() -> None:
    torch.empty(2**56, dtype=torch.int8)


def refused_by_numpy() -> None:
    np.empty(2**56, np.int8)


def refused_by_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def refused_by_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


class Small:
    """Scores like the cheap scorer what, with padding, has no more than `room` tokens."""

    def __init__(self, room: int, refuse: Callable[[], None]) -> None:
        self.room = room
        self.refuse = refuse
        self.sizes: list[int] = []

    @property
    def nbytes(self) -> int:
        return 0

    def score(self, token_ids: list[np.ndarray], roles: list[np.ndarray]) -> Scores:
        padded = len(token_ids) * max(map(len, token_ids))
        self.sizes.append(len(token_ids))
        if padded > self.room:
            self.refuse()
        return CHEAP.score(token_ids, roles)


def rows_of(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.full(length, row, np.int32), np.arange(length) % 2)
        for row, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    "refuse",
    [refused_by_the_allocator, refused_by_numpy, refused_by_cuda, refused_by_cublas],
)
def test_what_fits_is_scored_and_the_rest_is_named(refuse: Callable[[], None]) -> None:
    model = Small(20, refuse)
    batch = rows_of([3, 4, 20, 21, 5, 6, 5, 30])
    parts = list(score_what_fits(model, batch))
    assert [row for part in parts for row in part.rows] == list(range(8))
    lost = [row for part in parts if part.scores is None for row in part.rows]
    assert lost == [3, 7]
    assert model.sizes[0] == 8
    assert len(parts) < 8, "what fits together stays together"
    for part in parts:
        if part.scores is not None:
            for place, row in enumerate(part.rows):
                alone, _ = CHEAP.score([batch[row][0]], [batch[row][1]])
                mine = part.scores[0].take([place])
                assert len(mine.row) == len(batch[row][0]), "roles change with every token"
                for found, expected in zip(astuple(mine), astuple(alone), strict=True):
                    np.testing.assert_array_equal(found, expected)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 60))
def test_exactly_what_cannot_fit_alone_is_lost(lengths: list[int], room: int) -> None:
    parts = list(score_what_fits(Small(room, refused_by_the_allocator), rows_of(lengths)))
    lost = [row for part in parts if part.scores is None for row in part.rows]
    assert lost == [row for row, length in enumerate(lengths) if length > room]


def test_memory_that_another_process_has_is_not_the_conversations_fault() -> None:
    with pytest.raises(TransientError, match="one token"):
        list(score_what_fits(Small(0, refused_by_the_allocator), rows_of([3, 4])))


def device_side_assert() -> None:
    raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with ...")


def illegal_access() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel ...")


@pytest.mark.parametrize("fail", [device_side_assert, illegal_access])
def test_a_broken_device_ends_the_run(fail: Callable[[], None]) -> None:
    with pytest.raises(RunFailedError, match=r"the device has failed .*start again") as caught:
        list(score_what_fits(Small(0, fail), rows_of([3])))
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, TransientError), "this process cannot try again"


def bug() -> None:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="mat1"):
        list(score_what_fits(Small(0, bug), rows_of([3, 4])))


# --- batches ------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 300), max_size=60),
    st.integers(1, 1000),
    st.integers(1, 20),
)
def test_batches_hold_everything_once_and_no_more_than_asked(
    lengths: list[int], tokens: int, rows: int
) -> None:
    found = list(batches(lengths, tokens, rows))
    order = [index for batch in found for index in batch]
    assert order == [index for _, index in sorted((n, i) for i, n in enumerate(lengths))]
    for batch, following in zip(found, [*found[1:], None], strict=False):
        padded = len(batch) * lengths[batch[-1]]
        assert len(batch) <= rows
        assert padded <= tokens or len(batch) == 1
        if following is not None:
            more = (len(batch) + 1) * lengths[following[0]]
            assert len(batch) == rows or more > tokens, "the next one would have fitted"


def test_a_batch_is_smaller_where_it_has_to_fit_into_caches() -> None:
    assert default_tokens(torch.device("cpu")) == 2048
    assert default_tokens(torch.device("cuda", 1)) == 4096
