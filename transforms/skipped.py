"""Records passed over with a reason: counted, so that the ledger can balance."""

from dataclasses import dataclass

import apache_beam as beam
from apache_beam.metrics import Metrics

from schemas.records import Skipped


@dataclass
class CountSkipped(beam.PTransform):
    """Skipped to nothing; one count each, in all and per reason."""

    def expand(self, skipped: beam.PCollection[Skipped]) -> beam.PCollection[Skipped]:
        return skipped | beam.Map(_count)


def _count(skipped: Skipped) -> Skipped:
    Metrics.counter("deltawatch", "skipped").inc()
    Metrics.counter("deltawatch", f"skipped_{skipped.reason}").inc()
    return skipped
