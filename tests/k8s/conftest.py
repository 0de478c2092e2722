"""What the checks of the manifests share: the server, and the manifests as kustomize renders them.

No fixture of tests/conftest.py is used here: the model and the broker have nothing to do with it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, Document, cluster
from server.build import Tools, tools

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"


@pytest.fixture(scope="session")
def programs() -> Tools:
    return tools()


@pytest.fixture(scope="session")
def api(programs: Tools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server that has the namespace and the service account of the base."""
    with cluster(programs, tmp_path_factory.mktemp("cluster")) as running:
        base = rendered_folder(running, K8S / "base")
        running.make(*(each for each in base if each["kind"] in ("Namespace", "ServiceAccount")))
        yield running


Render = Callable[..., list[Document]]
"""Takes names of components; returns the objects of the base with them."""


@pytest.fixture(scope="session")
def render(api: Cluster) -> Iterator[Render]:
    """Renders an overlay that a user could have written."""
    # kustomize takes relative paths only, so the overlay must lie in the repository.
    overlay = ROOT / "build/k8s/overlay"
    overlay.mkdir(parents=True, exist_ok=True)

    def rendered(*components: str) -> list[Document]:
        content = {
            "resources": ["../../../k8s/base"],
            "components": [f"../../../k8s/components/{name}" for name in components],
        }
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return rendered_folder(api, overlay)

    yield rendered
    (overlay / "kustomization.yaml").unlink(missing_ok=True)


def rendered_folder(api: Cluster, folder: Path) -> list[Document]:
    """The objects of a folder with a kustomization."""
    made = api.run("kustomize", str(folder))
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))
