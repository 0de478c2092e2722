"""What is done to a broker that no method of `Broker` does."""

import re
import signal

from pipeline.demo.broker import Broker, free_ports

_ADVERTISED = re.compile(r"(?m)^(advertised\.listeners=.*:)(\d+)$")


def pause(broker: Broker) -> None:
    """Stop it where it stands; its connections stay open."""
    broker._signal(signal.SIGSTOP)


def resume(broker: Broker) -> None:
    """Let it go on."""
    broker._signal(signal.SIGCONT)


def advertise(broker: Broker, port: int) -> None:
    """Restart it under another address; it still listens at its own."""
    broker.stop()
    settings = broker._settings
    settings.write_text(_ADVERTISED.sub(rf"\g<1>{port}", settings.read_text()))
    broker.start()


def own_port(broker: Broker) -> int:
    """The port it is reached at now."""
    return int(broker.bootstrap.rpartition(":")[2])


def free_port() -> int:
    """A port for a proxy."""
    return free_ports(1)[0]
