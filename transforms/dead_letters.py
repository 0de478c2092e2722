"""Records that could not be scored, to the dead-letter topic with a reason."""

from dataclasses import dataclass

import apache_beam as beam
from apache_beam.metrics import Metrics

from schemas import dead_letters
from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.ids import dead_letter_id
from schemas.records import DeadLetter
from transforms.deliver import Deliver, OutMessage


@dataclass
class SendDeadLetters(beam.PTransform):
    """DeadLetter to one delivered JSON message each.

    Attributes:
      uri: where they go.
      properties: how Kafka brokers are secured.
    """

    uri: str
    properties: ClientProperties = NOT_SECURED

    def expand(self, dead: beam.PCollection[DeadLetter]) -> beam.PCollection[OutMessage]:
        return (
            dead
            | "Describe" >> beam.Map(_describe)
            | "Send" >> Deliver(self.uri, "dead_lettered", self.properties)
        )


def _describe(dead: DeadLetter) -> OutMessage:
    Metrics.counter("deltawatch", f"dead_lettered_{dead.reason}").inc()
    return OutMessage(
        dead_letter_id(dead.header.position, dead.reason),
        dead_letters.encode(dead_letters.to_json(dead)),
    )
