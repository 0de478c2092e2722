"""Clients of Kafka brokers, made by what their properties say now."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kafka.errors import KafkaError

from schemas import client_properties as names
from schemas.client_properties import ClientProperties, Settings
from transforms.kafka import reasons

CONNECT_MS = 4000
"""For the connection that goes ahead of a client."""

_ARGUMENTS = {
    names.PROTOCOL: "security_protocol",
    names.MECHANISM: "sasl_mechanism",
    names.USERNAME: "sasl_plain_username",
    names.PASSWORD: "sasl_plain_password",
    names.CA: "ssl_cafile",
    names.CERTIFICATE: "ssl_certfile",
    names.KEY: "ssl_keyfile",
    names.KEY_PASSWORD: "ssl_password",
}
_NO_PASSWORD = {names.KEY_PASSWORD: ""}  # with None, OpenSSL would ask at the terminal

_Client = TypeVar("_Client")


class UnreachableError(Exception):
    """A client cannot be had. The message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Brokers:
    """Brokers of a cluster and how they are secured: what clients can be shared by."""

    bootstrap: tuple[str, ...]  # "host:port"
    properties: ClientProperties

    def __str__(self) -> str:
        """Their addresses."""
        return ",".join(self.bootstrap)


def connect(
    make: Callable[..., _Client], brokers: Brokers, settings: Settings, **options: Any
) -> _Client:
    """A client of kafka-python.

    Args:
      make: its class.
      brokers: where it connects to.
      settings: what stands in the brokers' properties now.
      options: any other arguments of the class.

    Raises:
      UnreachableError: no broker lets it in.
    """
    arguments: dict[str, Any] = {"bootstrap_servers": list(brokers.bootstrap)}
    arguments |= {_ARGUMENTS[name]: value for name, value in {**_NO_PASSWORD, **settings}.items()}
    failure = reasons.failure_of(arguments, CONNECT_MS)
    if reasons.is_refusal(failure):  # again and again a wrong password may lock the user out
        raise UnreachableError(reasons.explained(failure, str(brokers), settings))
    try:
        return make(**arguments, **options)
    except KafkaError as error:
        why = reasons.explained(failure or error, str(brokers), settings)
        raise UnreachableError(why) from error
