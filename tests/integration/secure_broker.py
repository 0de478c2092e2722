"""A real broker that lets in only whom it knows: TLS by an own CA, SCRAM or certificates, ACLs."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from kafka import KafkaAdminClient
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from pipeline.demo.broker import Broker, free_ports

HOST = "127.0.0.1"
USER = "watcher"
PASSWORD = "pass#word=9"
CERTIFIED = "certified"
"""The user whom the client certificate names."""

KEY_PASSWORD = "key-pass"

# Tests manage topics and ACLs at PLAINTEXT, whose nameless user may do everything.
_SETTINGS = f"""
listeners=SCRAM://{HOST}:[scram],MUTUAL://{HOST}:[mutual],PLAINTEXT://{HOST}:{{port}},\
CONTROLLER://{HOST}:{{controller_port}}
advertised.listeners=SCRAM://{HOST}:[scram],MUTUAL://{HOST}:[mutual],PLAINTEXT://{HOST}:{{port}}
listener.security.protocol.map=SCRAM:SASL_SSL,MUTUAL:SSL,PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.scram.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.mutual.ssl.client.auth=required
ssl.principal.mapping.rules=RULE:^CN=([a-z]+).*$/$1/
ssl.keystore.type=PEM
ssl.keystore.location=[folder]/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location=[folder]/ca.pem
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""


@dataclass(frozen=True)
class SecureBroker:
    """The broker, and how its clients get in."""

    broker: Broker
    scram: str  # address of the listener that wants TLS and a password
    mutual: str  # address of the listener that wants a certificate
    folder: Path  # of certificates and properties

    def properties(self, name: str, **changes: str | None) -> Path:
        """A file that lets USER in, but for the changes: `sasl_password="x"`, None to drop it."""
        values: dict[str, str | None] = {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_username": USER,
            "sasl_password": PASSWORD,
            "ssl_ca_location": "ca.pem",
        }
        lines = [
            f"{key.replace('_', '.')}={value}\n"
            for key, value in {**values, **changes}.items()
            if value is not None
        ]
        path = self.folder / f"{name}.properties"
        path.write_text("# who may come in\n" + "".join(lines))
        return path

    def certified(self, name: str, **changes: str | None) -> Path:
        """A file that lets CERTIFIED in at `mutual`, but for the changes."""
        values: dict[str, str | None] = {
            "security_protocol": "SSL",
            "sasl_mechanism": None,
            "sasl_username": None,
            "sasl_password": None,
            "ssl_certificate_location": "client.pem",
            "ssl_key_location": "client.key",
            "ssl_key_password": KEY_PASSWORD,
        }
        return self.properties(name, **{**values, **changes})

    def allow(self, operation: str, topic: str, user: str = USER) -> None:
        """Let the user do an operation, such as READ, on a topic that need not exist."""
        with self._admin() as admin:
            admin.create_acls([_acl(ACL, operation, topic, user)])

    def forbid(self, operation: str, topic: str, user: str = USER) -> None:
        """Take that back."""
        with self._admin() as admin:
            admin.delete_acls([_acl(ACLFilter, operation, topic, user)])

    def topics(self) -> list[str]:
        """All topics there are."""
        with self._admin() as admin:
            return list(admin.list_topics())

    def set_password(self, user: str, password: str) -> None:
        """Give a user, known or new, a password."""
        with self._admin() as admin:
            credential = UserScramCredentialUpsertion(user, ScramMechanism.SCRAM_SHA_512, password)
            admin.alter_user_scram_credentials([credential])

    @contextmanager
    def _admin(self) -> Iterator[KafkaAdminClient]:
        with closing(KafkaAdminClient(bootstrap_servers=self.broker.bootstrap)) as admin:
            yield admin


@contextmanager
def secure_broker(folder: Path, jars: Path) -> Iterator[SecureBroker]:
    """Run one with certificates and data in `folder`."""
    _write_certificates(folder)
    scram, mutual = free_ports(2)
    settings = _SETTINGS.replace("[scram]", str(scram)).replace("[mutual]", str(mutual))
    settings = settings.replace("[folder]", str(folder))
    users = [f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"]
    with Broker(folder / "broker", jars, settings, users) as running:
        yield SecureBroker(running, f"{HOST}:{scram}", f"{HOST}:{mutual}", folder)


def _write_certificates(folder: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    other.cert_pem.write_to_path(str(folder / "other-ca.pem"))
    served = authority.issue_cert(HOST)
    chain = b"".join(each.bytes() for each in served.cert_chain_pems)
    (folder / "broker.pem").write_bytes(_key(served, serialization.NoEncryption()) + chain)
    client = authority.issue_cert("client.test", common_name=CERTIFIED)
    client.cert_chain_pems[0].write_to_path(str(folder / "client.pem"))
    locked = serialization.BestAvailableEncryption(KEY_PASSWORD.encode())
    (folder / "client.key").write_bytes(_key(client, locked))


def _key(
    certificate: trustme.LeafCert, encryption: serialization.KeySerializationEncryption
) -> bytes:
    """The private key in PKCS 8, which is all that Kafka takes."""
    key = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, encryption)


def _acl(kind: type[ACLFilter], operation: str, topic: str, user: str) -> ACLFilter:
    pattern = ResourcePattern(ResourceType.TOPIC, topic)
    allow, action = ACLPermissionType.ALLOW, ACLOperation[operation]
    return kind(f"User:{user}", "*", action, allow, pattern)
