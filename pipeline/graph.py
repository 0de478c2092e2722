"""The whole job, from log to verdict."""

from pathlib import Path

import apache_beam as beam

from pipeline.job import Job
from schemas.plan import Plan
from transforms.alerts import SendAlerts
from transforms.archive_tables import WriteTables
from transforms.dead_letters import SendDeadLetters
from transforms.decode import Decode
from transforms.judge import JudgeEpochs, JudgeStart
from transforms.read import ReadLog
from transforms.score import Score
from transforms.skipped import CountSkipped
from transforms.snapshots import WriteSnapshots
from transforms.tokenize import Tokenize


def build(pipeline: beam.Pipeline, job: Job, plan: Plan, start: JudgeStart, folder: Path) -> None:
    """Lay out one slice of the job.

    Args:
      pipeline: what to build on; any runner.
      job: the configuration.
      plan: which records are read.
      start: the ranges they are judged against.
      folder: where files wait for their epoch to close.
    """
    records = pipeline | "Read" >> ReadLog(plan, job.event_time, job.epoch_ms, job.kafka_properties)
    decoded = records | "Decode" >> Decode(job.routes)
    ready = decoded.conversations | "Tokenize" >> Tokenize(
        job.engines, job.max_tokens, job.batch_tokens
    )
    outcomes = ready.batches | "Score" >> Score(job.engines, keep_tokens=job.excerpt_tokens > 0)
    judged = outcomes.scored | "Judge" >> JudgeEpochs(job.policy, start, job.epoch_ms)
    dead = (decoded.dead_letters, ready.dead_letters, outcomes.unscored) | "Dead" >> beam.Flatten()

    judged.verdicts | "Alert" >> SendAlerts(
        job.alerts, job.directions, plan.clock_ms, job.excerpts, job.kafka_properties
    )
    judged.verdicts | "Archive" >> WriteTables(folder, job.epoch_ms, job.directions, job.excerpts)
    judged.snapshots | "KeepRanges" >> WriteSnapshots(folder)
    dead | "DeadLetters" >> SendDeadLetters(job.dead_letters, job.kafka_properties)
    decoded.skipped | "Skip" >> CountSkipped()
