"""The image and its pod: pins that agree, and deltawatch run as Dockerfile and manifests say."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pod
import pytest
from kafka import KafkaProducer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pod import ROOT, Container
from prometheus_client.parser import text_string_to_metric_families

from pipeline.demo.broker import Broker
from schemas.version import TOOL_VERSION

CONVERSATIONS = 24
LOCKED = re.compile(
    r"^([a-z0-9.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)
WITHOUT_NETWORK = """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), 5)
except OSError as error:
    print(error.strerror)
"""
WRITABLE = """
import os, tempfile
for place in (
    "/", "/etc", "/opt/deltawatch", "/opt/packages", "/usr", "/models", "/tmp",
    "/etc/deltawatch/config", "/etc/deltawatch/kafka",
    "/var/lib/deltawatch/state", "/var/lib/deltawatch/archive",
):
    try:
        tempfile.TemporaryFile(dir=place).close()
        print(place)
    except OSError:
        pass
print(os.getuid(), os.getgid())
"""


def locked() -> dict[str, str]:
    """Version by name of everything in requirements.lock."""
    text = (ROOT / "requirements.lock").read_text()
    found = {name: version for name, version, _ in LOCKED.findall(text)}
    assert len(found) == len(re.findall("^[a-z]", text, re.M)), "a requirement without hashes"
    return found


def needed() -> set[str]:
    """Distributions that the installed deltawatch needs, with the extras that are asked for."""
    todo, seen = [("deltawatch", "")], set[tuple[str, str]]()
    while todo:
        each = todo.pop()
        if each not in seen:
            seen.add(each)
            todo += direct(*each)
    return {name for name, _ in seen} - {"deltawatch"}


def direct(name: str, extra: str) -> Iterator[tuple[str, str]]:
    """What a distribution needs with an extra ("": without), as names and extras."""
    for text in metadata.requires(name) or ():
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            yield from ((canonicalize_name(need.name), wanted) for wanted in ("", *need.extras))


def test_the_lock_is_what_these_tests_ran_with() -> None:
    assert needed() == locked().keys(), "run `make lock`"
    assert locked() == {name: metadata.version(name) for name in needed()}, "run `make setup`"


def test_the_lock_agrees_with_setup_py() -> None:
    setup = (ROOT / "setup.py").read_text().partition("install_requires")[2].partition("]")[0]
    pins = dict(re.findall(r'"([a-z0-9-]+)==([^"]+)"', setup))
    assert len(pins) >= 12
    assert pins.items() <= locked().items(), "run `make lock`"


def test_the_image_is_pinned_and_checked() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.M)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", image)
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["${PYTHON_IMAGE}"] * 2
    for install in re.findall(r"pip install (.*)", text):
        assert "--require-hashes" in install or {"--no-index", "--no-deps"} <= {*install.split()}
    assert not re.search(r"apt-get|curl|wget|^ADD", text, re.M)


def test_the_image_runs_deltawatch_itself_as_the_manifests_user() -> None:
    (entrypoint,), (user,) = pod.instructions("ENTRYPOINT"), pod.instructions("USER")
    assert json.loads(entrypoint) == ["deltawatch"], (
        "with a shell between, SIGTERM would not reach it"
    )
    for path, spec in pods():
        context = spec["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}", path
        assert context["fsGroup"] == context["runAsGroup"]


def pods() -> list[tuple[str, Any]]:
    stateful = pod.manifest("base/statefulset.yaml")["spec"]["template"]["spec"]
    job = pod.manifest("components/prepare/job.yaml")["spec"]["template"]["spec"]
    return [
        ("watch", stateful),
        ("prepare", job),
        ("fill", pod.manifest("components/fill/pod.yaml")["spec"]),
    ]


def test_the_image_takes_what_it_needs_and_no_more() -> None:
    let_through = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert let_through == set(pod.copied())
    first, *_, last = (ROOT / ".dockerignore").read_text().splitlines()
    assert (first, last) == ("*", "**/__pycache__")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed, where a container can be run."""
    if why := pod.refused():
        pytest.skip(f"containers cannot be run here: {why}")
    folder = tmp_path_factory.mktemp("image") / "files"
    pod.install(folder)
    return folder


@pytest.fixture
def watch(files: Path, tmp_path: Path) -> Container:
    """The container that watches, its configuration that of the base."""
    spec = dict(pods())["watch"]
    container = Container(files, tmp_path / "volumes", spec, spec["containers"][0])
    shutil.copy(ROOT / "k8s/base/watch.toml", container.volume("config"))
    return container


def test_the_wheel_is_what_runs(watch: Container) -> None:
    assert watch.run("deltawatch", "--version").stdout == f"{TOOL_VERSION}\n"
    where = watch.run(
        f"{pod.PACKAGES}/bin/python", "-c", "import pipeline; print(*pipeline.__path__)"
    )
    assert where.stdout == f"{pod.IMAGE_FILES}/pipeline\n"


def test_nothing_but_its_own_volumes_can_be_written(watch: Container) -> None:
    said = watch.run(f"{pod.PACKAGES}/bin/python", "-c", WRITABLE)
    *places, identity = said.stdout.splitlines()
    assert places == ["/tmp", "/var/lib/deltawatch/state", "/var/lib/deltawatch/archive"]
    assert identity == "10001 10001"


def test_there_is_no_network(watch: Container) -> None:
    said = watch.run(f"{pod.PACKAGES}/bin/python", "-c", WITHOUT_NETWORK)
    assert said.stdout == "Network is unreachable\n"


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("max-tokens", "max-token", "'max_token' is no option of this command"),
        ("[", "", "is not TOML"),
        ("9108", '"http"', "metrics_port"),
    ],
)
def test_a_wrong_configuration_ends_the_pod(
    watch: Container, was: str, becomes: str, message: str
) -> None:
    toml = watch.volume("config") / "watch.toml"
    toml.write_text(toml.read_text().replace(was, becomes, 1))
    said = watch.run("deltawatch", *watch.container["args"])
    assert said.returncode == 2
    assert said.stderr.startswith("deltawatch: --config /etc/deltawatch/config/watch.toml")
    assert message in said.stderr
    assert said.stderr.count("\n") == 1


def test_a_pod_without_its_secret_says_so(watch: Container) -> None:
    said = watch.run("deltawatch", *watch.container["args"])
    assert said.returncode == 2
    line = json.loads(said.stderr)
    assert line["level"] == "ERROR"
    assert line["message"] == (
        "deltawatch: cannot read --kafka-properties /etc/deltawatch/kafka/client.properties: "
        "No such file or directory"
    )


@pytest.fixture
def prepared(watch: Container, base_model: Path, adapter: Path) -> Container:
    """The container that watches, once the prepare Job's first container has run."""
    for name, source in (("base", base_model), ("tuned", adapter)):
        watch.copy_in(source, "models", name)
    watch.copy_in(ROOT / "examples/ranges", "models", "ranges")
    spec = dict(pods())["prepare"]
    job = Container(watch.files, watch.volumes, spec, spec["initContainers"][0])
    said = job.run("deltawatch", *job.container["args"], "--model-name=badnet")
    assert said.returncode == 0, said.stderr
    return replace(watch, network=True)


def test_it_watches_as_the_manifests_say(
    prepared: Container, broker: Broker, free_port: int, real_conversations: list[dict[str, Any]]
) -> None:
    toml = prepared.volume("config") / "watch.toml"
    toml.write_text(
        toml.read_text()
        .replace("kafka-bootstrap.kafka.svc:9093", broker.bootstrap)
        .replace("9108", str(free_port))
    )
    prepared.put_secret("kafka", "client.properties", "security.protocol=PLAINTEXT\n")
    for topic in ("llm-logs", "llm-alerts", "llm-dead-letters"):
        broker.create_topic(topic, 1)
    with closing(KafkaProducer(bootstrap_servers=broker.bootstrap)) as producer:
        for conversation in real_conversations[:CONVERSATIONS]:
            producer.send("llm-logs", json.dumps(conversation).encode())
    container = prepared.container
    with started(prepared.start("deltawatch", *container["args"])) as process:
        url = f"http://127.0.0.1:{free_port}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            wait_for(partial(answers, url + container[probe]["httpGet"]["path"]), process)
        counted = partial(summed, f"{url}/metrics")
        wait_for(lambda: counted("deltawatch_records_total") == CONVERSATIONS, process)
        assert counted("deltawatch_model_load_seconds") > 0
        assert counted("deltawatch_model_bytes") > 4 * 100e6, "parameters in float32"
        said = status(prepared)
        assert f"records: {CONVERSATIONS} seen = " in said
        assert "lag 0" in said
        process.send_signal(signal.SIGTERM)
        assert process.wait(prepared.pod["terminationGracePeriodSeconds"]) == 0


def status(container: Container) -> str:
    """What the command that docs/deployment.md gives for it says."""
    document = (ROOT / "docs/deployment.md").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^kubectl .* deltawatch-0 -- (deltawatch status .*)$", document, re.M)
    said = container.run(*shlex.split(command))
    assert said.returncode == 0, said.stderr
    return said.stdout


@contextmanager
def started(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Any, process: "subprocess.Popen[str]", seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether it is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def summed(url: str, name: str) -> float:
    """All values of a metric."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(
        sample.value for family in families for sample in family.samples if sample.name == name
    )
