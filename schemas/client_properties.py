"""A client.properties file: how brokers are secured, in the names of librdkafka.

A line is `name=value`; blank lines and lines that begin with `#` are comments. Blanks around a
name and a value do not count, every other character of a value does. Parsing is strict: what
would be ignored, such as `sasl.password` without SASL, is refused. Messages name keys and line
numbers, never values: they may be secrets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import ConfigurationError

OPTION = "--kafka-properties"

PROTOCOL = "security.protocol"
MECHANISM = "sasl.mechanism"
USERNAME = "sasl.username"
PASSWORD = "sasl.password"
CA = "ssl.ca.location"
CERTIFICATE = "ssl.certificate.location"
KEY = "ssl.key.location"
KEY_PASSWORD = "ssl.key.password"

_NAME = re.compile(r"[a-z]+(\.[a-z]+)+")
_ALIASES = {"sasl.mechanisms": MECHANISM}
_CHOICES = {
    PROTOCOL: ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"),
    MECHANISM: ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
}
_SASL = (MECHANISM, USERNAME, PASSWORD)
_TLS = (CA, CERTIFICATE, KEY, KEY_PASSWORD)
_LOCATIONS = (CA, CERTIFICATE, KEY)
_PARTNERS = {CERTIFICATE: KEY, KEY: CERTIFICATE, KEY_PASSWORD: KEY}

Settings = Mapping[str, str]
"""Values by name; choices in upper case, locations with the file's folder before them."""


@dataclass(frozen=True, slots=True)
class ClientProperties:
    """Where the settings stand. It holds none of them, so it may be pickled and printed.

    Attributes:
      path: the file; None: brokers are not secured.
    """

    path: Path | None = None

    def read(self) -> Settings:
        """The settings as they stand in the file now: a secret may be changed at any time.

        Raises:
          ConfigurationError: the file cannot be read, or something in it is wrong or missing.
        """
        if self.path is None:
            return {PROTOCOL: "PLAINTEXT"}
        try:
            return _parse(self.path.read_text("utf-8"), self.path)
        except OSError as error:
            raise ConfigurationError(
                f"cannot read {OPTION} {self.path}: {error.strerror}"
            ) from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"{OPTION} {self.path} is not text in UTF-8") from None


NOT_SECURED = ClientProperties()


def _parse(text: str, path: Path) -> Settings:
    settings: dict[str, str] = {}
    lines: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            where = f"{OPTION} {path}, line {number}"
            name, value = _setting(line, where)
            if name in settings:
                raise ConfigurationError(f"{where}: {name} is given twice; give it once")
            settings[name], lines[name] = value, where
    if PROTOCOL not in settings:
        choices = ", ".join(_CHOICES[PROTOCOL])
        raise ConfigurationError(f"{OPTION} {path} has no {PROTOCOL}; give one of {choices}")
    _check_used(settings, lines)
    _check_complete(settings, path)
    located = {name: str(path.parent / settings[name]) for name in _LOCATIONS if name in settings}
    return {**settings, **located}


def _setting(line: str, where: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in line.partition("="))
    if not equals or not _NAME.fullmatch(name):  # a line that went wrong may be a secret
        raise ConfigurationError(f"{where}: it is not name=value")
    name = _ALIASES.get(name, name)
    if name not in (PROTOCOL, *_SASL, *_TLS):
        raise ConfigurationError(f"{where}: {name!r} is not a setting that can be given here")
    if not value:
        raise ConfigurationError(f"{where}: {name} has no value")
    if name not in _CHOICES:
        return name, value
    if value.upper() not in _CHOICES[name]:
        choices = ", ".join(_CHOICES[name])
        raise ConfigurationError(f"{where}: {name} is none of {choices}")
    return name, value.upper()


def _check_used(settings: Settings, lines: Mapping[str, str]) -> None:
    protocol = settings[PROTOCOL]
    for name in settings:
        if (name in _SASL and not _uses_sasl(protocol)) or (
            name in _TLS and not protocol.endswith("SSL")
        ):
            raise ConfigurationError(
                f"{lines[name]}: {name} means nothing with {PROTOCOL}={protocol}; "
                f"drop it or correct {PROTOCOL}"
            )


def _check_complete(settings: Settings, path: Path) -> None:
    needed = [(name, PROTOCOL) for name in _SASL if _uses_sasl(settings[PROTOCOL])]
    needed += [(partner, name) for name, partner in _PARTNERS.items() if name in settings]
    for name, by in needed:
        if name not in settings:
            raise ConfigurationError(f"{OPTION} {path} has {by} but no {name}; give both")


def _uses_sasl(protocol: str) -> bool:
    return protocol.startswith("SASL")
