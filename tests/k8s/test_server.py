"""What a real API server says of the manifests, and of manifests with a fault in them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from cluster import Cluster, Document
from conftest import K8S, Render, rendered_folder
from workloads import Workload, only, workloads

VARIANTS = [(), ("gpu",), ("fill",), ("prepare",), ("prepare", "gpu")]
EVERYTHING = ("fill", "prepare", "gpu")


@pytest.mark.parametrize("components", VARIANTS, ids=lambda names: "+".join(("base", *names)))
def test_the_server_takes_it(api: Cluster, render: Render, components: tuple[str, ...]) -> None:
    documents = render(*components)
    said = api.dry_run(*documents)
    assert said.returncode == 0, said.stderr
    taken = [line for line in said.stdout.splitlines() if line.endswith("(server dry run)")]
    assert len(taken) == len(documents) >= 7


def test_the_overlay_is_the_base_with_its_component(api: Cluster, render: Render) -> None:
    assert rendered_folder(api, K8S / "overlays/gpu") == render("gpu")


def test_a_dry_run_makes_nothing(api: Cluster, render: Render) -> None:
    assert api.dry_run(*render()).returncode == 0
    assert api.run("get", "statefulsets", "--all-namespaces").stdout == ""


@pytest.mark.parametrize("components", VARIANTS, ids=lambda names: "+".join(("base", *names)))
def test_the_namespace_lets_its_pods_in(
    api: Cluster, render: Render, components: tuple[str, ...]
) -> None:
    made = workloads(render(*components))
    assert len(made) == 1 + len(set(components) - {"gpu"})
    for workload in made:
        said = api.dry_run(workload.pod())
        assert said.returncode == 0, said.stderr


def test_every_misspelled_field_is_refused(api: Cluster, render: Render) -> None:
    kinds = set()
    for document in render(*EVERYTHING):
        wrong, where = misspelled(document)
        said = api.dry_run(wrong)
        assert said.returncode != 0, document["kind"]
        assert f'unknown field "{where}"' in said.stderr
        kinds.add(document["kind"])
    assert kinds >= {"StatefulSet", "Job", "NetworkPolicy", "ConfigMap", "Service", "Namespace"}


def misspelled(document: Document) -> tuple[Document, str]:
    """The object with the first field of its content misspelled, and that field's path."""
    wrong = deepcopy(document)
    within = wrong.get("spec", wrong)
    name = min(within.keys() - {"apiVersion", "kind", "metadata"}, default="metadata")
    within[f"{name}x"] = within.pop(name) if name != "metadata" else {}
    return wrong, f"spec.{name}x" if "spec" in wrong else f"{name}x"


Change = Callable[[Document], Any]
"""Does something to the `spec` of a pod."""


def of_container(**values: Any) -> Change:
    """What changes the security context of the first container."""
    return lambda spec: spec["containers"][0]["securityContext"].update(values)


UNSAFE: dict[str, Change] = {
    "runs as root": lambda spec: spec["securityContext"].update(runAsUser=0),
    "may run as root": lambda spec: spec["securityContext"].update(runAsNonRoot=False),
    "no seccomp": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "the node's network": lambda spec: spec.update(hostNetwork=True),
    "the node's disk": lambda spec: spec["volumes"].append(
        {"name": "node", "hostPath": {"path": "/"}}
    ),
    "privileged": of_container(privileged=True, allowPrivilegeEscalation=True),
    "escalation": of_container(allowPrivilegeEscalation=True),
    "capabilities": of_container(capabilities={}),
}


@pytest.mark.parametrize("change", UNSAFE.values(), ids=UNSAFE.keys())
def test_an_unsafe_pod_is_refused(api: Cluster, render: Render, change: Change) -> None:
    watch = watching(render())
    pod = watch.pod()
    change(pod["spec"])
    said = api.dry_run(pod)
    assert said.returncode != 0
    assert 'violates PodSecurity "restricted:latest"' in said.stderr


def test_an_unsafe_template_is_refused(api: Cluster, render: Render) -> None:
    stateful = only(render(), "StatefulSet")
    stateful["spec"]["template"]["spec"]["securityContext"]["runAsUser"] = 0
    said = api.dry_run(stateful)
    assert said.returncode != 0
    assert "would violate PodSecurity" in said.stderr


WRONG: dict[str, tuple[Change, str]] = {
    "a mount without a volume": (lambda spec: spec["volumes"].pop(), "volumeMounts"),
    "an unknown resource": (
        lambda spec: spec["containers"][0]["resources"]["limits"].update(gpu=1),
        "resources.limits",
    ),
    "a probe of no port": (
        lambda spec: spec["containers"][0]["livenessProbe"]["httpGet"].update(port=0),
        "livenessProbe",
    ),
    "a third policy of restarts": (
        lambda spec: spec.update(restartPolicy="Sometimes"),
        "restartPolicy",
    ),
}


@pytest.mark.parametrize(("change", "field"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_refused(api: Cluster, render: Render, change: Change, field: str) -> None:
    stateful = only(render(), "StatefulSet")
    change(stateful["spec"]["template"]["spec"])
    said = api.dry_run(stateful)
    assert said.returncode != 0
    assert field in said.stderr


def watching(documents: list[Document]) -> Workload:
    """The pod of the StatefulSet."""
    (found,) = (each for each in workloads(documents) if each.owner["kind"] == "StatefulSet")
    return found
