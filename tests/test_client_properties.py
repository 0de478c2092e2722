import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.errors import ConfigurationError

SECRET = "Tr0ub4dor"
SASL = {"sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "u", "sasl.password": SECRET}
TLS = {"ssl.ca.location": "ca.pem"}
PAIR = {"ssl.certificate.location": "c.pem", "ssl.key.location": "k.pem"}

VALUES = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1)
BLANKS = st.sampled_from(["", " ", "\t"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties") / "client.properties"


def written(path: Path, text: str) -> ClientProperties:
    path.write_bytes(text.encode())
    return ClientProperties(path)


def refused(path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        written(path, text).read()
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert SECRET not in message
    return message


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, str], str]:
    """Settings that belong together, and a file of them in some order and layout."""
    sasl, tls = draw(st.booleans()), draw(st.booleans())
    protocol = ("SASL_" if sasl else "") + ("SSL" if tls else "PLAINTEXT")
    settings = {"security.protocol": protocol}
    stripped = VALUES.map(str.strip).filter(bool)
    if sasl:
        settings["sasl.mechanism"] = draw(st.sampled_from(["PLAIN", "SCRAM-SHA-256"]))
        settings |= {name: draw(stripped) for name in ("sasl.username", "sasl.password")}
    if tls:
        wanted = draw(st.sampled_from([{}, TLS, PAIR, {**PAIR, "ssl.key.password": ""}]))
        settings |= {name: draw(stripped) for name in wanted}
    lines = ["# a comment = none", "  #sasl.password=x", "", " \t"]
    for name, value in settings.items():
        written_name = draw(st.sampled_from([name, "sasl.mechanisms"])) if "mech" in name else name
        blanks = [draw(BLANKS) for _ in range(4)]
        lines.append(f"{blanks[0]}{written_name}{blanks[1]}={blanks[2]}{value}{blanks[3]}")
    return settings, draw(st.sampled_from(["\n", "\r\n"])).join(draw(st.permutations(lines)))


@given(files())
def test_what_a_file_says_is_read(path: Path, made: tuple[dict[str, str], str]) -> None:
    settings, text = made
    found = written(path, text).read()
    assert found.keys() == settings.keys()
    for name, value in settings.items():
        expected = str(path.parent / value) if name.endswith("location") else value
        assert found[name] == expected


@given(st.text() | st.lists(VALUES.map(lambda value: f"sasl.password={value}")).map("\n".join))
def test_any_text_is_read_or_refused_in_one_line(path: Path, text: str) -> None:
    try:
        written(path, text.encode("utf-8", "replace").decode()).read()
    except ConfigurationError as error:
        assert "\n" not in str(error)


def lines(*several: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for each in several for name, value in each.items())


def protocol(name: str) -> dict[str, str]:
    return {"security.protocol": name}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no security.protocol"),
        ("# only a comment", "has no security.protocol"),
        (lines(protocol("TLS")), "line 1: security.protocol is none of PLAINTEXT, SSL"),
        (lines(protocol("SSL"), {"ssl.cipher.suites": SECRET}), "line 2: 'ssl.cipher.suites' is"),
        (lines(protocol("SASL_SSL"), {"sasl.jaas.config": SECRET}), "line 2: 'sasl.jaas.config'"),
        (lines(protocol("SSL")) + f"\n{SECRET}\n", "line 3: it is not name=value"),
        (lines(protocol("SSL")) + f"{SECRET}==\n", "line 2: it is not name=value"),
        (lines(protocol("SSL"), protocol("SSL")), "line 2: security.protocol is given twice"),
        (lines(protocol("SASL_SSL"), SASL, {"sasl.mechanisms": "PLAIN"}), "line 5: sasl.mechanism"),
        (lines(protocol("SSL"), {"ssl.ca.location": ""}), "line 2: ssl.ca.location has no value"),
        (
            lines(protocol("SASL_SSL"), {**SASL, "sasl.mechanism": "GSSAPI"}),
            "line 2: sasl.mechanism is none of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512",
        ),
        (
            lines(protocol("SSL"), SASL),
            "line 2: sasl.mechanism means nothing with security.protocol=SSL",
        ),
        (
            lines(protocol("SASL_PLAINTEXT"), SASL, TLS),
            "line 5: ssl.ca.location means nothing with security.protocol=SASL_PLAINTEXT",
        ),
        (lines(SASL), "has no security.protocol"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(path: Path, text: str, says: str) -> None:
    assert says in refused(path, text)


@pytest.mark.parametrize("missing", SASL)
def test_sasl_needs_all_of_its_settings(path: Path, missing: str) -> None:
    given = {name: value for name, value in SASL.items() if name != missing}
    message = refused(path, lines(protocol("sasl_ssl"), given))
    assert f"has security.protocol but no {missing}" in message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ssl.certificate.location": "c.pem"}, "no ssl.key.location"),
        ({"ssl.key.location": "k.pem"}, "no ssl.certificate.location"),
        ({"ssl.key.password": SECRET}, "no ssl.key.location"),
    ],
)
def test_a_certificate_and_its_key_come_together(
    path: Path, given: dict[str, str], says: str
) -> None:
    assert says in refused(path, lines(protocol("SSL"), given))


def test_locations_count_from_the_folder_unless_they_are_absolute(path: Path) -> None:
    pair = {"ssl.certificate.location": "in/c.pem", "ssl.key.location": "/etc/k.pem"}
    found = written(path, lines(protocol("SSL"), pair)).read()
    assert found["ssl.certificate.location"] == str(path.parent / "in" / "c.pem")
    assert found["ssl.key.location"] == "/etc/k.pem"


def test_a_file_that_cannot_be_read(path: Path) -> None:
    for elsewhere, says in ((path.parent / "none", "No such file"), (path.parent, "directory")):
        with pytest.raises(ConfigurationError, match=says):
            ClientProperties(elsewhere).read()
    path.write_bytes(b"security.protocol=SSL\nssl.key.password=\xff\n")
    with pytest.raises(ConfigurationError, match="is not text in UTF-8"):
        ClientProperties(path).read()


def test_the_file_is_read_anew_and_never_kept(path: Path) -> None:
    properties = written(path, lines(protocol("SASL_SSL"), SASL))
    assert properties.read()["sasl.password"] == SECRET
    assert SECRET not in repr(properties)
    assert SECRET.encode() not in pickle.dumps(properties)
    written(path, lines(protocol("SASL_SSL"), {**SASL, "sasl.password": "new"}))
    assert properties.read()["sasl.password"] == "new"


def test_without_a_file_brokers_are_not_secured() -> None:
    assert NOT_SECURED.read() == {"security.protocol": "PLAINTEXT"}
