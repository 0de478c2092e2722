"""Why brokers do not let a client in, in one line that says what to do.

A client of kafka-python tries to connect until its time is over, also with a wrong password, and
then says no more than that. One connection of its own parts, made alone, says what it met.
"""

import ssl
from typing import Any, TypeGuard

from kafka.errors import (
    AuthorizationError,
    KafkaError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net import KafkaConnectionManager, KafkaTCPTransport, NetworkSelector

from schemas import client_properties as names
from schemas.client_properties import Settings
from schemas.text import printable

_REFUSALS = (SaslAuthenticationFailedError, UnsupportedSaslMechanismError)

_OTHER_NAME = "use an address that it holds"
_OTHER_TIME = "renew it, or correct the clock of this machine"
_REMEDIES = {
    9: _OTHER_TIME,  # X509_V_ERR_CERT_NOT_YET_VALID
    10: _OTHER_TIME,  # X509_V_ERR_CERT_HAS_EXPIRED
    62: _OTHER_NAME,  # X509_V_ERR_HOSTNAME_MISMATCH
    64: _OTHER_NAME,  # X509_V_ERR_IP_ADDRESS_MISMATCH
}
_OTHER_CA = f"give the CA that signed it as {names.CA} in {names.OPTION}"


def failure_of(arguments: dict[str, Any], limit_ms: int) -> Exception | None:
    """What a server has against a connection; None as soon as one of them has nothing.

    Args:
      arguments: those of a client.
      limit_ms: how long all servers together may take.
    """
    limit = limit_ms // len(arguments["bootstrap_servers"])
    net = NetworkSelector()
    manager = _Manager(net, **arguments, request_timeout_ms=limit)
    failure = None
    try:
        for broker in manager.cluster.bootstrap_brokers():
            try:
                manager.run(_greet, manager, broker.node_id, limit)
                return None
            except (KafkaError, OSError) as error:
                failure = error
            if is_refusal(failure):
                break
    finally:
        manager.close()
        net.close()
    return failure


def is_refusal(failure: Exception | None) -> TypeGuard[Exception]:
    """Whether trying again would have the same end."""
    distrusted = isinstance(failure and failure.__context__, ssl.SSLCertVerificationError)
    return distrusted or isinstance(failure, _REFUSALS)


def explained(failure: Exception, servers: str, settings: Settings) -> str:
    """Why a client cannot be had, and what to do about it, in one line."""
    if isinstance(failure.__context__, ssl.SSLCertVerificationError):
        return _distrusted(failure.__context__, servers)
    reason = printable(str(failure.args[0] if failure.args else type(failure).__name__))
    if isinstance(failure, _REFUSALS):
        password = isinstance(failure, SaslAuthenticationFailedError)
        wrong = f"{names.USERNAME} or {names.PASSWORD}" if password else names.MECHANISM
        return (
            f"the Kafka broker at {servers} refuses this user ({reason}); correct {wrong} "
            f"in {names.OPTION}"
        )
    return (
        f"no Kafka broker answers at {servers} with {names.PROTOCOL}={settings[names.PROTOCOL]} "
        f"({reason}); start it or correct the address, or say in {names.OPTION} how it is secured"
    )


def in_words(error: KafkaError) -> str:
    """What went wrong with a client that was connected, in one line."""
    text = printable(str(error))
    if isinstance(error, AuthorizationError):
        return f"this user lacks a permission ({text}); grant it by an ACL"
    return text


async def _greet(manager: KafkaConnectionManager, node: str, limit_ms: int) -> None:
    await manager.get_connection(node, timeout_ms=limit_ms)
    await manager.cluster.refresh_metadata(node)


class _Manager(KafkaConnectionManager):
    """Hears out a broker that refuses and hangs up at once.

    kafka-python 3.0.12 drops what it received together with the end of a connection.
    """

    async def _build_transport(self, *args: Any, **kwargs: Any) -> KafkaTCPTransport:
        transport = await super()._build_transport(*args, **kwargs)
        receive = transport._sock_recv

        def receive_first() -> tuple[bytes, Exception | None]:
            data, error = receive()
            return data, None if data else error

        transport._sock_recv = receive_first
        return transport


def _distrusted(error: ssl.SSLCertVerificationError, servers: str) -> str:
    remedy = _REMEDIES.get(error.verify_code, _OTHER_CA)
    reason = error.verify_message.rstrip(".")
    return f"the certificate of the Kafka broker at {servers} is not trusted ({reason}); {remedy}"
