"""Everything that can be found wrong before anything starts, turned into a job or one line.

Every function here raises ConfigurationError with what is wrong and what to do.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline import runner
from pipeline.job import Job, Model
from pipeline.tables import Table
from schemas.artefacts import read_json
from schemas.client_properties import ClientProperties
from schemas.errors import ConfigurationError
from schemas.uris import KafkaUri, parse_uri
from transforms.delivery.sinks import check_sink
from transforms.logs.open import Logs
from transforms.logs.times import EventTime
from transforms.model import directions, loading
from transforms.model.adapter import check_shareable
from transforms.model.batching import default_tokens
from transforms.model.directions import Directions
from transforms.model.engine import TrunkEngine
from transforms.model.shared import AdapterEngine, Adapters
from transforms.model.trunk import CHUNK_TOKENS
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges
from transforms.ranges.snapshots import MANIFEST, load_snapshot

ONE_EPOCH_MS = 10**14
"""Longer than any log: everything is one epoch."""


def job(known: argparse.Namespace, beam_arguments: Sequence[str], *, endless: bool) -> Job:
    """Resolve and check the options of `audit` (endless=False) or `watch` (endless=True)."""
    runner.check_beam_arguments(beam_arguments)
    properties = kafka_properties(known)
    inputs = check_inputs(known, properties, endless=endless)
    check_writable(known.archive, "--archive")
    alerts = known.alerts or str(known.archive / "alerts.jsonl")
    dead_letters = known.dead_letters or str(known.archive / "dead_letters.jsonl")
    logs = Logs(inputs, properties)
    for uri in (alerts, dead_letters):
        if check_sink(uri, properties) in logs.places:
            raise ConfigurationError(
                f"{uri} is an --input too and would be read again; give another"
            )
    models, max_tokens = _models(known)
    return Job(
        inputs=inputs,
        event_time=EventTime(known.event_time),
        epoch_ms=known.epoch,
        models=models,
        policy=make_policy(known.policy, _policy_settings(known)),
        archive=known.archive,
        alerts=alerts,
        dead_letters=dead_letters,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens(known),
        excerpt_tokens=known.excerpt_tokens,
        slice_records=known.slice_records,
        idle_ms=known.idle,
        keep_days=known.keep,
        kafka_properties=properties,
        beam_arguments=tuple(beam_arguments),
    )


def kafka_properties(known: argparse.Namespace) -> ClientProperties:
    """How brokers are secured; the file can be read and nothing in it is wrong or missing."""
    path = known.kafka_properties
    properties = ClientProperties(path and path.absolute())
    properties.read()
    return properties


def check_inputs(
    known: argparse.Namespace, properties: ClientProperties, *, endless: bool
) -> tuple[str, ...]:
    """The inputs as URIs with an end, or without one for `watch`; each can be read."""
    inputs = tuple(_input(text, endless=endless) for text in known.input)
    logs = Logs(inputs, properties)
    for partition in logs.partitions():
        logs.end(partition)  # of a gzip file that is cut off, it cannot be said
    return inputs


def check_model(known: argparse.Namespace) -> tuple[TrunkEngine, Directions]:
    """The engine, once folders, directions, tokenizer and device are known to be usable."""
    artefact = directions.load(known.directions)
    directions.check_model(artefact, known.base, tuple(known.tuned))
    loading.placement(known.device, known.dtype)
    engine = _engine_of(known, tuple(known.tuned), known.directions)
    engine.tokenizer()
    return engine, artefact


def check_max_tokens(known: argparse.Namespace, engine: TrunkEngine | AdapterEngine) -> int:
    """Where conversations are cut: as asked for, else at the end of the model's context."""
    if known.max_tokens is not None and known.max_tokens > engine.context:
        raise ConfigurationError(
            f"--max-tokens {known.max_tokens} is more than the model's context; give at most "
            f"{engine.context}"
        )
    return known.max_tokens or engine.context


def batch_tokens(known: argparse.Namespace) -> int:
    """How many tokens make a batch: as asked for, else what suits the device."""
    device, _ = loading.placement(known.device, known.dtype)
    return known.batch_tokens or default_tokens(device)


def check_writable(folder: Path, option: str) -> None:
    """Make the folder and see that files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {option} {folder} ({error.strerror}); give a writable folder"
        ) from None


def _input(text: str, *, endless: bool) -> str:
    uri = parse_uri(text)
    if endless and (not isinstance(uri, KafkaUri) or uri.end is not None):
        raise ConfigurationError(
            f"watch reads Kafka topics without an end, not {text}; use audit for a finished log"
        )
    if not endless and isinstance(uri, KafkaUri) and uri.end is None:
        return f"{text}{'&' if '?' in text else '?'}end=latest"
    return text


def _models(known: argparse.Namespace) -> tuple[tuple[Model, ...], int]:
    """What judges the records, and where conversations are cut."""
    tables = known.models or (Table((), tuple(known.tuned), known.directions, known.ranges),)
    checked = [check_model(known)] if not known.models else _check_tables(known)
    max_tokens = check_max_tokens(known, checked[0][0])
    models = []
    for table, (engine, artefact) in zip(tables, checked, strict=True):
        name = table.names[0] if table.names else known.model_name or artefact.manifest.model_name
        with _naming(table):
            ranges = _base_ranges(known, table.ranges, artefact, name, max_tokens)
        models.append(Model(name, engine, artefact, ranges, table.names))
    return tuple(models), max_tokens


def _check_tables(
    known: argparse.Namespace,
) -> list[tuple[TrunkEngine | AdapterEngine, Directions]]:
    """Like `check_model`, of every table; several share one base."""
    artefacts: list[Directions] = []
    for table in known.models:
        with _naming(table):
            artefacts.append(_check_table(known, table, artefacts))
    loading.placement(known.device, known.dtype)
    engines = _engines(known)
    for table, engine in zip(known.models, engines, strict=True):
        with _naming(table):
            engine.tokenizer()
    return list(zip(engines, artefacts, strict=True))


def _check_table(
    known: argparse.Namespace, table: Table, before: Sequence[Directions]
) -> Directions:
    if len(known.models) > 1:
        for folder in table.tuned:
            check_shareable(folder)
        if known.base is None:
            raise ConfigurationError("adapters need their model; name it by --base")
    artefact = directions.load(table.directions)
    # The base's files are read once: of the others it suffices that they name the same.
    directions.check_model(artefact, None if before else known.base, table.tuned)
    if before and artefact.manifest.base_hash != before[0].manifest.base_hash:
        raise ConfigurationError(
            f"its directions are of another base than those of the first; all models have to be "
            f"adapters over --base {known.base}"
        )
    return artefact


def _engines(known: argparse.Namespace) -> list[TrunkEngine | AdapterEngine]:
    tables: Sequence[Table] = known.models
    if len(tables) == 1:
        return [_engine_of(known, tables[0].tuned, tables[0].directions)]
    shared = Adapters(
        known.base,
        tuple(table.tuned for table in tables),
        tuple(table.directions for table in tables),
        known.device,
        known.dtype,
        known.batch_tokens or CHUNK_TOKENS,
    )
    return [AdapterEngine(shared, number) for number in range(len(tables))]


def _engine_of(known: argparse.Namespace, tuned: tuple[Path, ...], named: Path) -> TrunkEngine:
    chunk_tokens = known.batch_tokens or CHUNK_TOKENS
    return TrunkEngine(known.base, tuned, named, known.device, known.dtype, chunk_tokens)


@contextmanager
def _naming(table: Table) -> Iterator[None]:
    """Let what is wrong say in which of the tables it is."""
    try:
        yield
    except ConfigurationError as error:
        if not table.names:
            raise
        raise ConfigurationError(f"[[models]] {table.names[0]}: {error}") from None


def _policy_settings(known: argparse.Namespace) -> PolicySettings:
    return PolicySettings(
        rate=known.rate, percentile=known.percentile, min_calibration=known.min_calibration
    )


def _base_ranges(
    known: argparse.Namespace,
    folder: Path | None,
    artefact: Directions,
    model: str,
    max_tokens: int,
) -> Ranges:
    if folder is None:
        return _no_ranges(known, artefact, model)
    ranges = load_snapshot(folder, artefact.hash)
    calibrated_at = read_json(folder / MANIFEST)["made"].get("max_tokens")
    if calibrated_at != max_tokens:
        raise ConfigurationError(
            f"{folder} was calibrated with --max-tokens {calibrated_at}, not {max_tokens}; "
            f"scores of other lengths cannot be compared, give it so"
        )
    return ranges


def _no_ranges(known: argparse.Namespace, artefact: Directions, model: str) -> Ranges:
    undated = [text for text in known.input if not isinstance(parse_uri(text), KafkaUri)]
    if undated and known.event_time is None:
        raise ConfigurationError(
            f"{undated[0]} has no times to learn ranges along; give --ranges (made by `deltawatch "
            f"calibrate`), or --event-time with the field that dates a record"
        )
    return Ranges.empty(len(artefact.entries), artefact.hash, model)
