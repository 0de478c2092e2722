"""Flagged conversations to OCSF alerts, each with an id that a repeat would carry too."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import apache_beam as beam

from schemas import ocsf
from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.records import VerdictPack
from transforms.deliver import Deliver, OutMessage
from transforms.model.directions import Directions
from transforms.model.excerpts import Excerpts


@dataclass
class SendAlerts(beam.PTransform):
    """VerdictPack to one delivered alert for every flagged conversation.

    Attributes:
      uri: where they go.
      directions: per model the names of its directions.
      clock_ms: the plan's clock, for logs without times.
      excerpts: per model what makes the text shown with a peak; of others no text leaves.
      properties: how Kafka brokers are secured.
    """

    uri: str
    directions: Mapping[str, Directions]
    clock_ms: int
    excerpts: Mapping[str, Excerpts]
    properties: ClientProperties = NOT_SECURED

    def expand(self, verdicts: beam.PCollection[VerdictPack]) -> beam.PCollection[OutMessage]:
        return (
            verdicts
            | "Describe" >> beam.ParDo(_Describe(self.directions, self.clock_ms, self.excerpts))
            | "Send" >> Deliver(self.uri, "alerts", self.properties)
        )


class _Describe(beam.DoFn):
    def __init__(
        self,
        directions: Mapping[str, Directions],
        clock_ms: int,
        excerpts: Mapping[str, Excerpts],
    ) -> None:
        self._named = {name: (each.entries, each.hash) for name, each in directions.items()}
        self._clock_ms = clock_ms
        self._excerpts = excerpts

    def process(self, verdicts: VerdictPack) -> Iterator[OutMessage]:
        model = verdicts.scored.model
        for alert in ocsf.alerts(verdicts, *self._named[model], self._excerpts.get(model)):
            event = ocsf.to_ocsf(alert, self._clock_ms)
            yield OutMessage(event["metadata"]["uid"], ocsf.encode(event))
