"""A small run of `make fuzz`."""

from pathlib import Path

import fuzz

COUNT = 3000


def test_mutated_records_come_out_once_each(base_model: Path) -> None:
    found = fuzz.run(base_model, COUNT, seed=1)
    assert found.total() == COUNT
    expected = {"tokenized", "bad_json", "bad_encoding", "bad_messages", "unknown_format"}
    assert expected <= set(found), "the mutations reach every branch"
