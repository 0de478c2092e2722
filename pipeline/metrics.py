"""Prometheus metrics of a running job, and the two questions Kubernetes asks: alive, ready?

Counts come from the newest commit whenever they are scraped, so they are exact, survive restarts
and never show what was not committed. Durations and the models' size are this process's own.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.job import Job
from schemas.commit import Commit, Ledger
from schemas.errors import ConfigurationError
from schemas.plan import PartitionId
from schemas.reasons import SkipReason
from schemas.records import Role
from schemas.version import TOOL_VERSION
from transforms.ranges.policies import Missing

HUNG_SECONDS = 900
"""Longer than any slice and any wait for a broker: a loop silent for so long is stuck."""

SLICE_SECONDS = Histogram(
    "deltawatch_slice_seconds",
    "Duration of a slice's phases; score is a part of run.",
    ["phase"],
    registry=None,
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)


LOAD_SECONDS = Gauge(
    "deltawatch_model_load_seconds",
    "What loading took; of models over one base the first brings the base.",
    ["model"],
    registry=None,
)
MODEL_BYTES = Gauge(
    "deltawatch_model_bytes",
    "Weights and directions on the device; models over one base share the weights.",
    ["model"],
    registry=None,
)
_OF_PROCESS = (SLICE_SECONDS, LOAD_SECONDS, MODEL_BYTES)


@dataclass
class Health:
    """What the loop of slices tells about itself; written by it, read by the server's threads."""

    commit: Commit | None = None
    lags: Mapping[PartitionId, int] = field(default_factory=dict)
    missing: Mapping[str, Missing] = field(default_factory=dict)
    failures: int = 0
    failing: str | None = "starting"
    beat: float = field(default_factory=time.monotonic)

    def begun(self) -> None:
        """The loop begins; what came before it, such as loading, was not a turn of it."""
        self.beat = time.monotonic()

    def turned(
        self,
        commit: Commit,
        lags: Mapping[PartitionId, int],
        missing: Mapping[str, Missing],
    ) -> None:
        """A turn of the loop went well; `missing` is by the models' names."""
        self.commit, self.lags, self.missing = commit, lags, missing
        self.failing, self.beat = None, time.monotonic()

    def failed(self, why: str) -> None:
        """A turn of the loop failed and will be tried again."""
        self.failures += 1
        self.failing, self.beat = why, time.monotonic()

    @property
    def hung(self) -> bool:
        """Whether the loop has not turned for longer than any turn should take."""
        return time.monotonic() - self.beat > HUNG_SECONDS


@dataclass(eq=False)
class JobCollector(Collector):
    """Metrics made from a job's newest commit.

    Attributes:
      job: what runs.
      health: what its loop tells.
    """

    job: Job
    health: Health

    def collect(self) -> Iterator[Metric]:
        """Everything that is known now."""
        yield self._info()
        yield CounterMetricFamily(
            "deltawatch_failures", "Slices that failed and were tried again.", self.health.failures
        )
        yield from self._by_model()
        yield from self._lags()
        if self.health.commit is not None:
            yield from _of_commit(self.health.commit)

    def _info(self) -> Metric:
        labels = ("version", "model", "directions", "policy")
        info = GaugeMetricFamily("deltawatch_info", "What runs.", labels=labels)
        for name, directions in self.job.directions.items():
            info.add_metric([TOOL_VERSION, name, directions.hash[:12], self.job.policy.name], 1)
        return info

    def _by_model(self) -> Iterator[Metric]:
        several = len(self.job.models) > 1  # one has the labels it had before there were several
        labels = ["model", "role"] if several else ["role"]
        calibrated = GaugeMetricFamily(
            "deltawatch_calibrated",
            "Whether conversations with this role can be judged (1) or not yet (0).",
            labels=labels,
        )
        lacking = GaugeMetricFamily(
            "deltawatch_calibration_missing",
            "Conversations with this role that it takes until they can be judged.",
            labels=labels,
        )
        for name, role in product(self.job.directions, Role):
            missing = self.health.missing.get(name)  # not known before the first turn
            values = [name, role.name.lower()][0 if several else 1 :]
            calibrated.add_metric(values, float(missing is not None and missing[role] == 0))
            if missing is not None:
                lacking.add_metric(values, missing[role])
        yield from (calibrated, lacking)
        if self.health.commit is not None:
            yield _shifts(self.job, self.health.commit)
        if several and self.health.commit is not None:
            yield _conversations(self.job, self.health.commit)

    def _lags(self) -> Iterator[Metric]:
        lag = GaugeMetricFamily(
            "deltawatch_lag",
            "Offsets between the newest commit and the end of the log.",
            labels=["source", "partition"],
        )
        for partition, value in self.health.lags.items():
            lag.add_metric([partition.source, str(partition.partition)], value)
        yield lag
        if self.job.policy.asked_rate is not None:
            yield GaugeMetricFamily(
                "deltawatch_asked_rate",
                "Share of normal conversations that may be flagged.",
                self.job.policy.asked_rate,
            )


def serve(job: Job, health: Health, port: int) -> Callable[[], None]:
    """Serve /metrics, /healthz and /readyz from a thread; returns what ends it.

    Raises:
      ConfigurationError: the port cannot be had.
    """
    registry = CollectorRegistry()
    for collector in (JobCollector(job, health), *_OF_PROCESS, ProcessCollector(registry=None)):
        registry.register(collector)
    try:
        server = make_server("", port, _application(health, registry), _Server, _Silent)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on --metrics-port {port} ({error.strerror}); give a free one"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def close() -> None:
        server.shutdown()
        server.server_close()

    return close


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a client that never finishes its request must not hold up the end


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Probes come every few seconds; nobody reads a line for each."""


def _application(health: Health, registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)  # type: ignore[no-any-return]
        status, text = _probe(path, health)
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    return answer


def _probe(path: str, health: Health) -> tuple[str, str]:
    if path == "/healthz":
        return _answer("the loop of slices is stuck" if health.hung else None)
    if path == "/readyz":
        return _answer(health.failing)
    return "404 Not Found", "there are /metrics, /healthz and /readyz"


def _answer(wrong: str | None) -> tuple[str, str]:
    return ("200 OK", "ok") if wrong is None else ("503 Service Unavailable", wrong)


def _shifts(job: Job, commit: Commit) -> Metric:
    family = GaugeMetricFamily(
        "deltawatch_range_shift",
        "Whether far more conversations are flagged than asked for, and go on to be (1).",
        labels=["model"],
    )
    for model in job.models:
        family.add_metric([model.name], float(commit.models[model.name].shift.raised is not None))
    return family


def _conversations(job: Job, commit: Commit) -> Metric:
    family = CounterMetricFamily(
        "deltawatch_conversations",
        "Scored conversations of each model by their verdict.",
        labels=["model", "outcome"],
    )
    for model in job.models:
        for outcome, count in _verdicts(commit.models[model.name].ledger).items():
            family.add_metric([model.name, outcome], count)
    return family


def _verdicts(ledger: Ledger) -> dict[str, int]:
    return {
        "clean": ledger.scored - ledger.flagged - ledger.uncalibrated,
        "flagged": ledger.flagged,
        "not_calibrated": ledger.uncalibrated,
    }


def _of_commit(commit: Commit) -> Iterator[Metric]:
    total = commit.total_ledger
    outcomes = {
        **_verdicts(total),
        "dead_lettered": total.dead_lettered,
        "skipped": total.skipped,
        "lost": total.lost,
    }
    skips = {reason: n for reason, n in commit.reasons.items() if reason in set(SkipReason)}
    letters = {reason: n for reason, n in commit.reasons.items() if reason not in skips}
    counters = (
        ("records", "Records by what became of them.", "outcome", outcomes),
        ("dead_letters", "Records that could not be scored.", "reason", letters),
        ("skipped", "Records that hold no conversation by nature.", "reason", skips),
    )
    for name, text, label, values in counters:
        yield _labelled(CounterMetricFamily, f"deltawatch_{name}", text, label, values)
    yield CounterMetricFamily("deltawatch_tokens", "Tokens scored.", total.tokens)
    yield CounterMetricFamily("deltawatch_alerts", "Alerts acknowledged.", total.alerts)
    yield GaugeMetricFamily(
        "deltawatch_flagged_share", "Of all judged conversations.", total.flagged_share
    )
    yield GaugeMetricFamily(
        "deltawatch_last_commit_age_seconds",
        "Time since a slice was last committed.",
        time.time() - commit.committed_ms / 1000,
    )


def _labelled(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    family = kind(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], float(count))
    return family
