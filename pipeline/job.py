"""What is to be run, resolved and checked: the hand-over from the command line to the graph."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from schemas.artefacts import combined_hash
from schemas.client_properties import NOT_SECURED, ClientProperties
from schemas.uris import KafkaUri, parse_uri
from schemas.version import TOOL_VERSION
from transforms.decode import Routes
from transforms.logs.planner import Rules
from transforms.logs.times import EventTime
from transforms.model.directions import Directions
from transforms.model.engine import Engine
from transforms.model.excerpts import Excerpts
from transforms.ranges.generations import Calendar
from transforms.ranges.policies import Policy
from transforms.ranges.ranges import Ranges


@dataclass(frozen=True)
class Model:
    """A fine-tuned model whose conversations are judged.

    Attributes:
      name: under which they are judged and archived.
      engine: its tokenizer and scorer.
      directions: the artefact the scorer uses, for names and hash.
      base_ranges: what judging starts from; empty where nothing was calibrated.
      logged_as: what its records' model field may say; nothing: every record is its own.
    """

    name: str
    engine: Engine
    directions: Directions
    base_ranges: Ranges
    logged_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """Everything a slice needs besides its plan and what was judged before it.

    Attributes:
      inputs: URIs of the logs.
      event_time: what dates a record.
      epoch_ms: length of an epoch.
      models: what judges the records; one, or several that their model field tells apart.
      policy: decides about a conversation.
      archive: root of the Parquet tables.
      alerts: URI that alerts go to.
      dead_letters: URI that dead letters go to.
      max_tokens: conversations are cut there; None: never.
      batch_tokens: most tokens in a batch, padding included; a longer conversation is one alone.
      excerpt_tokens: tokens of text shown on each side of a peak; 0: no text leaves.
      slice_records: most records in a slice.
      idle_ms: how long a partition may be silent before it no longer holds the others back.
      keep_days: how long conversations stay in the ranges.
      kafka_properties: how the brokers of all its topics are secured.
      beam_arguments: handed to Beam as they are.
    """

    inputs: tuple[str, ...]
    event_time: EventTime
    epoch_ms: int
    models: tuple[Model, ...]
    policy: Policy
    archive: Path
    alerts: str
    dead_letters: str
    max_tokens: int | None = None
    batch_tokens: int = 4096
    excerpt_tokens: int = 0
    slice_records: int = 2000
    idle_ms: int = 30_000
    keep_days: int = 30
    kafka_properties: ClientProperties = NOT_SECURED
    beam_arguments: tuple[str, ...] = ()

    @property
    def dated(self) -> bool:
        """Whether the records have times; files have none but in a payload field."""
        kafka = any(isinstance(parse_uri(uri), KafkaUri) for uri in self.inputs)
        return kafka or self.event_time.field is not None

    @property
    def rules(self) -> Rules:
        """What dates records and bounds slices."""
        return Rules(self.event_time, self.epoch_ms, self.idle_ms)

    @property
    def calendar(self) -> Calendar:
        """Of the ranges' generations."""
        return Calendar(self.epoch_ms, self.keep_days)

    @property
    def routed(self) -> bool:
        """Whether a record's model field says which model judges it."""
        return any(model.logged_as for model in self.models)

    @property
    def routes(self) -> Routes:
        """Which model judges a conversation."""
        by_name = {name: model.name for model in self.models for name in model.logged_as}
        return Routes(by_name, None if self.routed else self.models[0].name)

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Tokenizers and scorers by the models' names."""
        return {model.name: model.engine for model in self.models}

    @property
    def directions(self) -> Mapping[str, Directions]:
        """The artefacts by the models' names."""
        return {model.name: model.directions for model in self.models}

    @property
    def excerpts(self) -> Mapping[str, Excerpts]:
        """By the models' names what makes the text shown in alerts; of none unless asked for."""
        engines = self.engines if self.excerpt_tokens else {}
        return {name: Excerpts(engine, self.excerpt_tokens) for name, engine in engines.items()}

    @property
    def run_id(self) -> str:
        """Names an audit's state and files, so that the same job again replaces what it wrote."""
        return self.config_hash[:12]

    def description(self) -> dict[str, Any]:
        """What `STATE/job.json` says of it."""
        return {
            "tool_version": TOOL_VERSION,
            **self._named(),
            "policy": self.policy.name,
            "settings": asdict(self.policy.settings),
            "inputs": list(self.inputs),
            "alerts": self.alerts,
            "dead_letters": self.dead_letters,
            "archive": str(self.archive),
        }

    @property
    def config_hash(self) -> str:
        """Changes with everything that could make a re-run of a plan give other results."""
        return combined_hash(
            {
                "inputs": "\n".join(self.inputs),
                "event_time": repr(self.event_time),
                "epoch_ms": str(self.epoch_ms),
                "engine": "\n".join(repr(model.engine) for model in self.models),
                "model": "\n".join(model.name for model in self.models),
                "directions": "\n".join(model.directions.hash for model in self.models),
                "policy": repr(self.policy),
                "base_ranges": "\n".join(model.base_ranges.hash for model in self.models),
                "outputs": "\n".join((str(self.archive), self.alerts, self.dead_letters)),
                "keep_days": str(self.keep_days),
                "tokens": f"{self.max_tokens}/{self.batch_tokens}/{self.excerpt_tokens}",
                **({"routes": repr(self.routes)} if self.routed else {}),
            }
        )

    def _named(self) -> dict[str, Any]:
        hashes = {name: directions.hash for name, directions in self.directions.items()}
        if self.routed:
            return {"models": hashes}
        ((model, directions_hash),) = hashes.items()
        return {"model": model, "directions_hash": directions_hash}
