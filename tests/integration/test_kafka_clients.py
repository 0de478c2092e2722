"""What a real secured broker lets in, and the one line where it does not."""

import socket
import ssl
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
import trustme
from secure_broker import CERTIFIED, KEY_PASSWORD, PASSWORD, SecureBroker

from pipeline.demo.broker import Broker
from schemas.client_properties import ClientProperties
from schemas.errors import ConfigurationError
from schemas.uris import KafkaUri
from transforms.kafka import clients, topics
from transforms.kafka.topics import check_topic

READ_ONLY, WRITE_ONLY, HIDDEN = "read-only", "write-only", "hidden"


def refused(
    address: str, path: Path | None, topic: str = READ_ONLY, operation: str = "READ"
) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_topic(KafkaUri((address,), topic), ClientProperties(path), operation)
    message = str(caught.value)
    assert "\n" not in message
    assert not any(secret in message for secret in (PASSWORD, KEY_PASSWORD, "not-the"))
    return message


@pytest.fixture(scope="module", autouse=True)
def known_topics(secured: SecureBroker) -> None:
    for topic in (READ_ONLY, WRITE_ONLY, HIDDEN):
        secured.broker.create_topic(topic)
    secured.allow("READ", READ_ONLY)
    secured.allow("WRITE", WRITE_ONLY)
    secured.allow("DESCRIBE", "described-and-missing")
    secured.allow("READ", READ_ONLY, CERTIFIED)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a client tries until its time is over: a shorter time."""
    monkeypatch.setattr(clients, "CONNECT_MS", 1500)
    monkeypatch.setattr(topics, "ASK_MS", 1500)


def test_the_right_to_the_operation_is_all_that_a_user_needs(secured: SecureBroker) -> None:
    properties = ClientProperties(secured.properties("good"))
    read = check_topic(KafkaUri((secured.scram,), READ_ONLY), properties, "READ")
    write = check_topic(KafkaUri((secured.scram,), WRITE_ONLY), properties, "WRITE")
    assert read == write
    assert len(read) == 22  # a cluster id


@pytest.mark.parametrize(
    ("topic", "operation", "says"),
    [
        (READ_ONLY, "WRITE", "this user may not write topic 'read-only'"),
        (WRITE_ONLY, "READ", "this user may not read topic 'write-only'"),
        (HIDDEN, "READ", "topic 'hidden' does not exist"),
        ("missing", "WRITE", "or this user may not see it"),
        ("described-and-missing", "READ", "create it or correct the name"),
    ],
)
def test_a_missing_right_is_known_before_anything_is_read_or_written(
    topic: str, operation: str, says: str, secured: SecureBroker
) -> None:
    assert says in refused(secured.scram, secured.properties("good"), topic, operation)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sasl_password": "not-the-password"}, "refuses this user"),
        ({"sasl_username": "nobody"}, "refuses this user"),
        ({"sasl_mechanism": "SCRAM-SHA-256"}, "correct sasl.mechanism in --kafka-properties"),
        ({"ssl_ca_location": "other-ca.pem"}, "give the CA that signed it as ssl.ca.location"),
        ({"ssl_ca_location": None}, "give the CA that signed it as ssl.ca.location"),
        ({"ssl_ca_location": "nowhere.pem"}, "No such file or directory"),
        ({"ssl_ca_location": "good.properties"}, "give a PEM file of certificates"),
    ],
)
def test_wrong_properties(changes: dict[str, str | None], says: str, secured: SecureBroker) -> None:
    secured.properties("good")
    assert says in refused(secured.scram, secured.properties("wrong", **changes))


def test_a_host_that_the_certificate_does_not_name(secured: SecureBroker) -> None:
    elsewhere = secured.scram.replace("127.0.0.1", "localhost")
    message = refused(elsewhere, secured.properties("good"))
    assert "Hostname mismatch, certificate is not valid for 'localhost'" in message
    assert "use an address that it holds" in message


def test_one_server_of_several_is_enough(secured: SecureBroker, closed_port: int) -> None:
    several = (f"127.0.0.1:{closed_port}", secured.scram)
    good = ClientProperties(secured.properties("good"))
    assert check_topic(KafkaUri(several, READ_ONLY), good, "READ")
    wrong = ClientProperties(secured.properties("wrong", sasl_password="not-the-password"))
    for order in (several, several[::-1]):
        with pytest.raises(ConfigurationError, match="refuses this user"):
            check_topic(KafkaUri(order, READ_ONLY), wrong, "READ")


def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    path = tmp_path / "client.properties"
    path.write_text("security.protocol=SSL\nssl.ca.location=ca.pem\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", not_after=datetime(2020, 1, 1)).configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(ssl.SSLError):
                context.wrap_socket(server.accept()[0], server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        message = refused(f"127.0.0.1:{server.getsockname()[1]}", path)
        thread.join()
    assert "certificate has expired" in message
    assert "renew it" in message


def test_listeners_of_another_protocol(
    secured: SecureBroker, broker: Broker, impatient: None
) -> None:
    assert "say in --kafka-properties how it is secured" in refused(secured.scram, None)
    sasl_tls = refused(broker.bootstrap, secured.properties("good"))
    assert "with security.protocol=SASL_SSL" in sasl_tls
    sasl = {"security_protocol": "SASL_PLAINTEXT", "ssl_ca_location": None}
    assert "with security.protocol=SASL_PLAINTEXT" in refused(
        broker.bootstrap, secured.properties("sasl", **sasl)
    )
    no_sasl = secured.certified("no-sasl")
    assert "with security.protocol=SSL" in refused(secured.scram, no_sasl)


def test_a_user_named_by_a_certificate(secured: SecureBroker) -> None:
    uri = KafkaUri((secured.mutual,), READ_ONLY)
    assert check_topic(uri, ClientProperties(secured.certified("certified")), "READ")
    message = refused(secured.mutual, secured.certified("certified"), WRITE_ONLY, "WRITE")
    assert "this user may not see it" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ssl_key_password": None}, "and ssl.key.password where the key has one"),
        ({"ssl_key_password": "not-the-password"}, "and ssl.key.password where the key has one"),
        ({"ssl_certificate_location": "ca.pem"}, "files that belong together"),
        (
            dict.fromkeys(
                ["ssl_certificate_location", "ssl_key_location", "ssl_key_password"], None
            ),
            "no Kafka broker answers",
        ),
    ],
)
def test_wrong_certificates(
    changes: dict[str, str | None], says: str, secured: SecureBroker, impatient: None
) -> None:
    assert says in refused(secured.mutual, secured.certified("wrong", **changes))
