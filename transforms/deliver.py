"""Messages to a topic or file, counted when they are acknowledged."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics

from schemas.client_properties import NOT_SECURED, ClientProperties
from transforms.delivery.sinks import open_sink


class OutMessage(NamedTuple):
    """What a sink takes: a key that is the same whenever the message is sent again, and bytes."""

    key: str
    value: bytes


@dataclass
class Deliver(beam.PTransform):
    """OutMessage to a sink, at least once: a bundle ends only when all of it is acknowledged.

    Attributes:
      uri: a Kafka topic or a `.jsonl` file.
      counter: name of the Beam counter of acknowledged messages.
      properties: how Kafka brokers are secured.
    """

    uri: str
    counter: str
    properties: ClientProperties = NOT_SECURED

    def expand(self, messages: beam.PCollection[OutMessage]) -> beam.PCollection[OutMessage]:
        return messages | beam.ParDo(_Send(self.uri, self.counter, self.properties))


class _Send(beam.DoFn):
    def __init__(self, uri: str, counter: str, properties: ClientProperties) -> None:
        self._uri = uri
        self._properties = properties
        self._acknowledged = Metrics.counter("deltawatch", counter)

    def start_bundle(self) -> None:
        self._sink = open_sink(self._uri, self._properties)

    def process(self, message: OutMessage) -> Iterator[OutMessage]:
        self._sink.send(message.key.encode(), message.value)
        yield message

    def finish_bundle(self) -> None:
        self._acknowledged.inc(self._sink.flush())
