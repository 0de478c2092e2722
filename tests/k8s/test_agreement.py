"""What no API server checks: that manifests, configuration and deltawatch's options agree."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Document
from conftest import K8S, Render
from workloads import Workload, only, workloads

from pipeline import metrics, options
from schemas.uris import KafkaUri, parse_uri
from schemas.version import TOOL_VERSION

EVERYTHING = ("fill", "prepare", "gpu")
WRITTEN = ("state", "archive", "out")
"""Options that name what a command writes."""


def runs(documents: list[Document], folder: Path) -> list[tuple[Workload, Document, Any]]:
    """Every container that runs deltawatch, with its options as deltawatch reads them."""
    return [
        (workload, container, parsed(workload, container, documents, folder))
        for workload in workloads(documents)
        for container in workload.containers
        if "command" not in container
    ]


def parsed(
    workload: Workload, container: Document, documents: list[Document], folder: Path
) -> argparse.Namespace:
    """The options of a container, its ConfigMap unpacked where the pod would have it."""
    root = folder / container["name"]
    for volume in workload.template["spec"]["volumes"]:
        if "configMap" in volume:
            unpack(volume["configMap"]["name"], documents, root / volume["name"])
    places = {mount["mountPath"]: str(root / mount["name"]) for mount in container["volumeMounts"]}
    arguments = [
        argument if before != "--config" else moved(argument, places)
        for before, argument in zip(["", *container["args"]], container["args"], strict=False)
    ]
    known, for_beam = options.parse(arguments)
    assert for_beam == [], "an option that deltawatch does not know"
    return known


def unpack(name: str, documents: list[Document], to: Path) -> None:
    (found,) = (
        each
        for each in documents
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name
    )
    to.mkdir(parents=True, exist_ok=True)
    for file, text in found["data"].items():
        (to / file).write_text(text)


def moved(path: str, places: dict[str, str]) -> str:
    """A path of the pod as one of this machine."""
    parent, _, name = path.rpartition("/")
    return f"{places[parent]}/{name}"


def paths(known: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Every folder and file of a command but its configuration, by option; some take several."""
    for name, value in vars(known).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Path) and name != "config":
                yield name, each


@pytest.fixture
def everything(render: Render) -> list[Document]:
    return render(*EVERYTHING)


@pytest.fixture
def by_command(everything: list[Document], tmp_path: Path) -> dict[str, argparse.Namespace]:
    return {known.command: known for _, _, known in runs(everything, tmp_path)}


def test_deltawatch_takes_every_configuration(by_command: dict[str, argparse.Namespace]) -> None:
    assert by_command.keys() == {"watch", "directions", "calibrate"}


def test_a_misspelled_option_would_be_found(render: Render, tmp_path: Path) -> None:
    documents = render()
    config = only(documents, "ConfigMap")
    config["data"]["watch.toml"] += "\nmax-token = 1\n"
    with pytest.raises(options.ConfigurationError, match="max_token"):
        runs(documents, tmp_path)


def test_every_path_is_on_a_volume_that_suits_it(
    everything: list[Document], tmp_path: Path
) -> None:
    seen = set()
    for workload, container, known in runs(everything, tmp_path):
        for name, path in paths(known):
            kind, mount, writable = workload.volume(str(path), container)
            expected = "secret" if name == "kafka_properties" else "persistentVolumeClaim"
            assert kind == expected, f"{known.command}: {name}"
            assert writable or name not in WRITTEN, f"{known.command} cannot write {name}"
            assert "subPath" not in mount, "a change of it would not reach the pod"
            seen.add(name)
    assert seen == {
        *WRITTEN, "base", "tuned", "directions", "ranges", "kafka_properties"
    }  # fmt: skip


def test_the_watch_writes_nothing_but_state_and_archive(everything: list[Document]) -> None:
    (watch,) = (each for each in workloads(everything) if each.owner["kind"] == "StatefulSet")
    (container,) = watch.containers
    writable = {
        mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly", False)
    }
    assert writable == {"state", "archive", "tmp"}
    kept = watch.owner["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert set(kept.values()) == {"Retain"}


def test_what_is_prepared_is_what_is_watched(by_command: dict[str, argparse.Namespace]) -> None:
    watch, directions = by_command["watch"], by_command["directions"]
    calibrate = by_command["calibrate"]
    assert directions.out == calibrate.directions == watch.directions
    assert calibrate.out == watch.ranges
    for name in ("tuned", "base"):
        assert len({str(getattr(known, name)) for known in by_command.values()}) == 1
    for name in ("max_tokens", "batch_tokens", "device", "dtype", "kafka_properties"):
        assert getattr(calibrate, name) == getattr(watch, name), name
    topics = {parse_uri(*known.input) for known in (calibrate, watch)}
    assert len({(uri.bootstrap, uri.topic) for uri in topics if isinstance(uri, KafkaUri)}) == 1


@pytest.mark.parametrize(("components", "device"), [((), "cpu"), (("gpu",), "cuda")])
def test_the_device_is_the_one_asked_for_of_the_cluster(
    render: Render, tmp_path: Path, components: tuple[str, ...], device: str
) -> None:
    for workload, container, known in runs(render("prepare", *components), tmp_path):
        if known.command == "directions":
            continue
        limits = container["resources"]["limits"]
        assert known.device == device
        assert limits.get("nvidia.com/gpu") == (1 if device == "cuda" else None)
        tolerated = [each["key"] for each in workload.template["spec"].get("tolerations", ())]
        assert tolerated == (["nvidia.com/gpu"] if device == "cuda" else [])
        assert device == "cpu" or known.dtype == "bfloat16"


def test_ports_are_those_at_which_deltawatch_listens(render: Render, tmp_path: Path) -> None:
    documents = render()
    ((_, container, known),) = runs(documents, tmp_path)
    (port,) = container["ports"]
    assert port["containerPort"] == known.metrics_port
    (served,) = only(documents, "Service")["spec"]["ports"]
    assert (served["targetPort"], served["port"]) == (port["name"], known.metrics_port)
    (let_in,) = only(documents, "NetworkPolicy")["spec"]["ingress"]
    assert [each["port"] for each in let_in["ports"]] == [port["name"]]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]


def test_the_pod_may_start_for_longer_than_a_loop_may_be_stuck(render: Render) -> None:
    (container,) = workloads(render())[0].containers
    startup, live = container["startupProbe"], container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > metrics.HUNG_SECONDS
    assert startup["httpGet"]["path"] == live["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_brokers_and_name_servers_are_all_that_can_be_reached(
    everything: list[Document], tmp_path: Path
) -> None:
    needed = {
        reached(server)
        for _, _, known in runs(everything, tmp_path)
        for text in (*getattr(known, "input", ()), *outputs(known))
        if isinstance(uri := parse_uri(text), KafkaUri)
        for server in uri.bootstrap
    }
    allowed = {
        (peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port["port"])
        for rule in only(everything, "NetworkPolicy")["spec"]["egress"]
        for peer in rule["to"]
        for port in rule["ports"]
    }
    assert allowed == needed | {("kube-system", 53)}
    assert len(needed) == 1


def reached(server: str) -> tuple[str, int]:
    """Namespace and port of a service's address."""
    host, _, port = server.rpartition(":")
    _, namespace, kind = host.split(".")
    assert kind == "svc"
    return namespace, int(port)


def outputs(known: argparse.Namespace) -> list[str]:
    return [getattr(known, name) for name in ("alerts", "dead_letters") if hasattr(known, name)]


def test_the_policy_is_of_every_pod_and_the_service_of_one(everything: list[Document]) -> None:
    policy = only(everything, "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    service = only(everything, "Service")
    found = []
    for workload in workloads(everything):
        assert policy["podSelector"]["matchLabels"].items() <= workload.labels.items()
        if service["spec"]["selector"].items() <= workload.labels.items():
            found.append(workload.owner["kind"])
    assert found == ["StatefulSet"]
    assert only(everything, "StatefulSet")["spec"]["serviceName"] == service["metadata"]["name"]


def test_every_pod_is_confined_and_its_second_sigterm_heard(everything: list[Document]) -> None:
    for workload in workloads(everything):
        spec = workload.template["spec"]
        assert spec["automountServiceAccountToken"] is False
        for container in workload.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            if "command" not in container:
                assert spec["shareProcessNamespace"] is True
                assert container["env"][0]["name"] == "OMP_NUM_THREADS"


def test_images_are_of_this_version_and_can_be_renamed_at_once(
    everything: list[Document],
) -> None:
    images = {each["image"] for work in workloads(everything) for each in work.containers}
    assert images == {f"deltawatch:{TOOL_VERSION}"}


@pytest.mark.parametrize("components", [(), ("fill",), ("prepare",)])
def test_the_watch_waits_for_what_it_needs(render: Render, components: tuple[str, ...]) -> None:
    assert only(render(*components), "StatefulSet")["spec"]["replicas"] == (0 if components else 1)


def test_another_configuration_restarts_the_pod(render: Render) -> None:
    name = only(render(), "ConfigMap")["metadata"]["name"]
    assert name.startswith("deltawatch-"), "no hash of the content"
    (used,) = (
        volume["configMap"]["name"]
        for volume in workloads(render())[0].template["spec"]["volumes"]
        if "configMap" in volume
    )
    assert used == name


def test_the_manifests_hold_no_secret(everything: list[Document]) -> None:
    assert "Secret" not in {each["kind"] for each in everything}
    assert not [path for path in K8S.rglob("*") if path.suffix in (".pem", ".key", ".properties")]
