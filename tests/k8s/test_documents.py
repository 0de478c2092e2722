"""What docs/deployment.md tells a platform engineer to write and to type."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Document
from conftest import K8S, ROOT, Render, rendered_folder
from workloads import only, workloads

DOCUMENT = (ROOT / "docs/deployment.md").read_text()
FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def block(words: str) -> str:
    """The code block with these words in it."""
    (found,) = (text for text in FENCED.findall(DOCUMENT) if words in text)
    return str(found)


@pytest.fixture
def overlay(api: Cluster) -> Iterator[Path]:
    """The overlay that the document shows, beside `k8s/` as it says."""
    folder = ROOT / "build/k8s/documented/deploy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "k8s").symlink_to(K8S)
    (folder / "kustomization.yaml").write_text(block("# deploy/kustomization.yaml"))
    for name in ("watch.toml", "calibrate.toml"):
        text = (K8S / "base" / name).read_text()
        (folder / name).write_text(text.replace("llm-logs", "other-logs"))
    yield folder
    shutil.rmtree(folder.parent)


def test_its_overlay_is_taken(api: Cluster, overlay: Path) -> None:
    documents = rendered_folder(api, overlay)
    said = api.dry_run(*documents)
    assert said.returncode == 0, said.stderr
    (config,) = (each for each in documents if each["kind"] == "ConfigMap")
    assert "other-logs" in config["data"]["watch.toml"]
    images = {each["image"] for work in workloads(documents) for each in work.containers}
    assert images == {re.findall(r"--tag (\S+)", DOCUMENT)[0]}
    peers = only(documents, "NetworkPolicy")["spec"]["egress"][0]["to"]
    assert [peer.keys() for peer in peers] == [{"ipBlock"}]


def test_its_secret_is_the_one_that_is_mounted(
    api: Cluster, render: Render, tmp_path: Path
) -> None:
    command = block("create secret").replace("\\\n", " ")
    for name in re.findall(r"--from-file=(\S+)", command):
        (tmp_path / name).write_text("content")
    placed = command.replace("--from-file=", f"--from-file={tmp_path}/")
    _, *arguments = shlex.split(placed)
    made = api.run(*arguments, "--dry-run=server", "--output=name")
    names = {
        f"secret/{volume['secret']['secretName']}\n"
        for work in workloads(render("prepare"))
        for volume in work.template["spec"]["volumes"]
        if "secret" in volume
    }
    assert {made.stdout} == names, made.stderr


def test_its_objects_are_there(render: Render) -> None:
    there = {name(each) for each in render("fill", "prepare", "gpu")}
    named = set(re.findall(r"\b(?:pod|job|statefulset)/[a-z0-9-]+", DOCUMENT))
    assert named == {"pod/fill-models", "job/deltawatch-prepare", "statefulset/deltawatch"}
    assert named <= there


def name(document: Document) -> str:
    return f"{document['kind'].lower()}/{document['metadata']['name']}"
