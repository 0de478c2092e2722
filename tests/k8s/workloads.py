"""What pods a set of manifests makes, and what their containers see."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster import Document


@dataclass(frozen=True)
class Workload:
    """A pod as some object of the manifests makes it.

    Attributes:
      owner: that object, or the pod itself.
      template: `metadata` and `spec` of the pod.
    """

    owner: Document
    template: Document

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def containers(self) -> list[Document]:
        """In the order in which they run."""
        spec = self.template["spec"]
        return [*spec.get("initContainers", ()), *spec["containers"]]

    def pod(self) -> Document:
        """The pod, as its controller would create it."""
        pod = {"apiVersion": "v1", "kind": "Pod", **deepcopy(self.template)}
        pod["metadata"] |= {"name": "a-pod", "namespace": self.owner["metadata"]["namespace"]}
        claims = {each["metadata"]["name"] for each in _claims(self.owner)}
        pod["spec"].setdefault("volumes", []).extend(
            {"name": name, "persistentVolumeClaim": {"claimName": f"{name}-a-pod"}}
            for name in sorted(claims)
        )
        return pod

    def volume(self, path: str, container: Document) -> tuple[str, Document, bool]:
        """Kind, mount and whether it can be written, of what holds this path in a container."""
        mounts = [
            mount
            for mount in container["volumeMounts"]
            if PurePosixPath(path).is_relative_to(mount["mountPath"])
        ]
        assert len(mounts) == 1, f"{path} is in {len(mounts)} mounts"
        return self._kind(mounts[0]["name"]), mounts[0], not mounts[0].get("readOnly", False)

    def _kind(self, name: str) -> str:
        if name in {each["metadata"]["name"] for each in _claims(self.owner)}:
            return "persistentVolumeClaim"
        volume = next(each for each in self.template["spec"]["volumes"] if each["name"] == name)
        (kind,) = volume.keys() - {"name"}
        return kind


def workloads(documents: Sequence[Document]) -> list[Workload]:
    """Every pod that the objects make."""
    return list(_workloads(documents))


def only(documents: Sequence[Document], kind: str) -> Document:
    """The one object of a kind."""
    (found,) = (each for each in documents if each["kind"] == kind)
    return found


def _workloads(documents: Sequence[Document]) -> Iterator[Workload]:
    for each in documents:
        if each["kind"] in ("StatefulSet", "Job"):
            yield Workload(each, each["spec"]["template"])
        elif each["kind"] == "Pod":
            yield Workload(each, {"metadata": each["metadata"], "spec": each["spec"]})


def _claims(owner: Document) -> list[Document]:
    return list(owner["spec"].get("volumeClaimTemplates", ()))
