import hashlib
import inspect
import re

from hypothesis import assume, given
from hypothesis import strategies as st

from schemas.ids import alert_id, dead_letter_id
from schemas.records import Position

WORDS = st.text() | st.sampled_from(["", '"', '","', ",", "\ud800", "1", "[", "\\"])
POSITIONS = st.builds(Position, WORDS, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))
ALERTS = st.tuples(POSITIONS, WORDS, WORDS)
LETTERS = st.tuples(POSITIONS, WORDS)


def test_ids_are_what_they_were_in_the_first_release() -> None:
    """Written out by hand: a changed id would make every consumer see old alerts as new ones."""
    position = Position("kafka://cluster/logs", 3, 14)
    alert = b'["alert","kafka://cluster/logs",3,14,"d1","budget/1"]'
    letter = b'["dead-letter","kafka://cluster/logs",3,14,"bad_json"]'
    assert alert_id(position, "d1", "budget/1") == hashlib.sha256(alert).hexdigest()
    assert dead_letter_id(position, "bad_json") == hashlib.sha256(letter).hexdigest()


@given(ALERTS, ALERTS)
def test_different_alerts_have_different_ids(
    one: tuple[Position, str, str], other: tuple[Position, str, str]
) -> None:
    assume(one != other)
    assert alert_id(*one) != alert_id(*other)


@given(LETTERS, LETTERS)
def test_different_dead_letters_have_different_ids(
    one: tuple[Position, str], other: tuple[Position, str]
) -> None:
    assume(one != other)
    assert dead_letter_id(*one) != dead_letter_id(*other)


@given(WORDS, WORDS, WORDS)
def test_a_border_between_parts_cannot_be_moved(a: str, b: str, c: str) -> None:
    assume(b)
    position = Position("s", 0, 0)
    assert alert_id(position, a + b, c) != alert_id(position, a, b + c)
    assert alert_id(position, a, b) != dead_letter_id(position, a)


@given(ALERTS)
def test_an_id_is_a_sha256(alert: tuple[Position, str, str]) -> None:
    assert re.fullmatch("[0-9a-f]{64}", alert_id(*alert))


def test_scores_take_no_part() -> None:
    assert list(inspect.signature(alert_id).parameters) == [
        "position",
        "directions_hash",
        "policy",
    ]
