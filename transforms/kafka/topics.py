"""Topics looked up before a run: they are there, and this user may do with them what it must."""

import ssl
from contextlib import closing
from typing import Any, Literal

from kafka import KafkaAdminClient
from kafka.errors import KafkaError, TopicAuthorizationFailedError, UnknownTopicOrPartitionError

from schemas import client_properties as names
from schemas.client_properties import ClientProperties, Settings
from schemas.errors import ConfigurationError
from schemas.uris import KafkaUri
from transforms.kafka import reasons
from transforms.kafka.clients import Brokers, UnreachableError, connect

ASK_MS = 4000
"""For a client to connect, and again to ask; with the connection ahead of it below 10 s where no
broker answers."""


def check_topic(
    uri: KafkaUri, properties: ClientProperties, operation: Literal["READ", "WRITE"]
) -> str:
    """Find out before a run whether a topic can be read or written to; takes at most 10 s.

    Topics are never created: a topic made by accident hides a misspelt name.

    Returns:
      The cluster's id.

    Raises:
      ConfigurationError: no broker lets this user in, there is no such topic, or the user has
        no right to the operation.
    """
    brokers, settings = Brokers(uri.bootstrap, properties), properties.read()
    _check_files(settings)
    limits = {"bootstrap_timeout_ms": ASK_MS, "request_timeout_ms": ASK_MS}
    try:
        with closing(connect(KafkaAdminClient, brokers, settings, **limits)) as admin:
            (topic,) = admin.describe_topics([uri.topic])
            cluster = admin.describe_cluster()["cluster_id"]
    except UnreachableError as error:
        raise ConfigurationError(str(error)) from error
    except KafkaError as error:
        raise ConfigurationError(reasons.explained(error, str(brokers), settings)) from error
    _check_allowed(topic, brokers, operation)
    return str(cluster)


def _check_files(settings: Settings) -> None:
    """Let OpenSSL read the files as every connection will."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority, certificate = settings.get(names.CA), settings.get(names.CERTIFICATE)
    try:
        if authority:
            context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot use {names.CA} {authority!r} ({error}); give a PEM file of certificates"
        ) from None
    try:
        if certificate:
            password = settings.get(names.KEY_PASSWORD, "")
            context.load_cert_chain(certificate, settings[names.KEY], password)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot use {names.CERTIFICATE} {certificate!r} with {names.KEY} ({error}); give PEM "
            f"files that belong together, and {names.KEY_PASSWORD} where the key has one"
        ) from None


def _check_allowed(topic: dict[str, Any], brokers: Brokers, operation: str) -> None:
    name, allowed = topic["name"], topic["authorized_operations"]
    if topic["error_code"] == TopicAuthorizationFailedError.errno:
        raise ConfigurationError(
            f"topic {name!r} does not exist at {brokers} or this user may not see it; create it "
            f"or correct the name, and grant the user {operation} on it by an ACL"
        )
    if topic["error_code"] == UnknownTopicOrPartitionError.errno:
        raise ConfigurationError(
            f"topic {name!r} does not exist at {brokers}; create it or correct the name"
        )
    if allowed is not None and operation not in allowed:  # None: brokers before 2.3 do not say
        raise ConfigurationError(
            f"this user may not {operation.lower()} topic {name!r} at {brokers}; grant the user "
            f"{operation} on it by an ACL, or give another user by {names.OPTION}"
        )
