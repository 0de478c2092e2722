"""Runs one slice's graph in this process and reads the counts back."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineResult

from pipeline.graph import build
from pipeline.job import Job
from schemas.commit import Ledger
from schemas.errors import ConfigurationError
from schemas.plan import Plan
from transforms.judge import JudgeStart


def run(job: Job, plan: Plan, start: JudgeStart, folder: Path) -> Ledger:
    """Run a slice to its end; what fails in it is raised.

    Returns:
      What became of the records, as counted by source and sinks.
    """
    # Named outright: "DirectRunner" would choose between three runners by what the graph holds.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(job.beam_arguments))
    build(pipeline, job, plan, start, folder)
    result = pipeline.run()
    result.wait_until_finish()
    return _ledger(result)


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


def _ledger(result: PipelineResult) -> Ledger:
    counters = {
        counter.key.metric.name: 0
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace == "deltawatch"
    }
    for counter in result.metrics().query()["counters"]:
        if counter.key.metric.name in counters:
            counters[counter.key.metric.name] += counter.committed
    return Ledger(**{field.name: counters.get(field.name, 0) for field in fields(Ledger)})
