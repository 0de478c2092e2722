"""Runs one slice's graph in this process and reads the counts back."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineResult
from apache_beam.utils import shared

from pipeline.graph import build
from pipeline.job import Job
from schemas.commit import Ledger
from schemas.errors import ConfigurationError
from schemas.plan import Plan
from transforms.archive_tables import OF_MODEL
from transforms.judge import JudgeStart

_REASONS = ("dead_lettered_", "skipped_")


class Counts(NamedTuple):
    """What a run counted of itself.

    Attributes:
      ledger: what became of the records, as counted by source and sinks.
      reasons: why records were not scored.
      by_model: what the archive counted of every model that had records.
      scoring_seconds: spent in the model.
    """

    ledger: Ledger = Ledger()
    reasons: Mapping[str, int] = MappingProxyType({})
    by_model: Mapping[str, Ledger] = MappingProxyType({})
    scoring_seconds: float = 0.0


def run(job: Job, plan: Plan, start: JudgeStart, folder: Path) -> Counts:
    """Run a slice to its end; what fails in it is raised."""
    # Named outright: "DirectRunner" would choose between three runners by what the graph holds.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(job.beam_arguments))
    build(pipeline, job, plan, start, folder)
    try:
        result = pipeline.run()
        result.wait_until_finish()
    finally:
        # RunInference leaves two entries of every graph there, for ever. No other graph runs now.
        shared._shared_map._cache_map.clear()
    counters = _counters(result)
    by_model = {
        namespace.removeprefix(OF_MODEL): Ledger(**counts)
        for namespace, counts in counters.items()
        if namespace.startswith(OF_MODEL)
    }
    return _counts(counters["deltawatch"], by_model)


def check_beam_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that neither deltawatch nor Beam knows; Beam itself would drop them.

    Raises:
      ConfigurationError: naming the first of them.
    """
    parser = _BeamArgumentParser(add_help=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        if hasattr(options, "_add_argparse_args"):
            options._add_argparse_args(parser)
    unknown = parser.parse_known_args(list(arguments))[1]
    if unknown:
        raise ConfigurationError(f"unknown argument {unknown[0]!r}; see --help")


def _counters(result: PipelineResult) -> dict[str, Counter[str]]:
    """By namespace, then by name."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for counter in result.metrics().query()["counters"]:
        name = counter.key.metric
        found[name.namespace][name.name] += counter.committed
    return found


def _counts(counters: Mapping[str, int], by_model: Mapping[str, Ledger]) -> Counts:
    ledger = Ledger(**{field.name: counters.get(field.name, 0) for field in fields(Ledger)})
    reasons = {
        name.removeprefix(prefix): count
        for name, count in counters.items()
        for prefix in _REASONS
        if name.startswith(prefix)
    }
    return Counts(ledger, reasons, by_model, counters.get("scoring_us", 0) / 1e6)
