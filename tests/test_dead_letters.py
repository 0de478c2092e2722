import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.dead_letters import MAX_ORIGINAL_BYTES, encode, to_json
from schemas.ids import dead_letter_id
from schemas.reasons import Reason
from schemas.records import DeadLetter, Header, Position

LETTERS = st.builds(
    DeadLetter,
    st.builds(
        Header,
        st.builds(Position, st.text(), st.integers(0, 99), st.integers(0, 2**63 - 1)),
        st.none() | st.integers(0, 2**42),
        st.none() | st.integers(0, 2**42),
        st.integers(0, 9),
        st.booleans(),
    ),
    st.sampled_from(Reason),
    st.text(st.characters()) | st.just("\ud800\nx"),
    st.none() | st.binary(),
)


@given(LETTERS)
def test_a_dead_letter_says_what_where_and_why(letter: DeadLetter) -> None:
    line = encode(to_json(letter))
    assert b"\n" not in line
    read = json.loads(line)
    position = letter.header.position
    assert set(read) == {
        "id", "reason", "detail", "source", "partition", "offset", "event_time", "original",
        "original_truncated", "tool_version",
    }  # fmt: skip
    assert read["id"] == dead_letter_id(position, letter.reason)
    assert Reason(read["reason"]) is letter.reason
    assert Position(read["source"], read["partition"], read["offset"]) == position
    assert read["event_time"] == letter.header.event_time
    original = read["original"]
    assert (original if original is None else base64.b64decode(original)) == letter.original
    assert read["original_truncated"] is False
    assert read["tool_version"] == "0.1.0"


@given(LETTERS)
def test_a_dead_letter_is_always_the_same_bytes_of_utf8(letter: DeadLetter) -> None:
    assert encode(to_json(letter)) == encode(to_json(letter))
    json.loads(encode(to_json(letter)))["detail"].encode("utf-8")


@pytest.mark.parametrize(("extra", "truncated"), [(0, False), (1, True), (10**6, True)])
def test_a_long_original_is_cut_and_says_so(extra: int, truncated: bool) -> None:
    original = b"\xff" * (64 * 1024 + extra)
    header = Header(Position("file://x?sha256=0", 0, 0), None, None, 0, False)
    read = to_json(DeadLetter(header, Reason.BAD_ENCODING, "d" * 10**6, original))
    assert base64.b64decode(read["original"]) == original[: 64 * 1024]
    assert read["original_truncated"] is truncated
    assert MAX_ORIGINAL_BYTES == 64 * 1024
    assert len(encode(read)) < 100_000
