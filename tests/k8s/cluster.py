"""A control plane of one: etcd and kube-apiserver, and kubectl as its administrator.

Nothing schedules or runs pods. What a server-side dry run shows is what a cluster's API server
would say: schema, defaults, validation and admission, Pod Security among it.
"""

import json
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from server.build import Tools

START_SECONDS = 120
Document = dict[str, Any]
"""One object of a manifest."""


class Cluster:
    """A running API server.

    Attributes:
      kubectl: the program.
      kubeconfig: a file that makes it an administrator.
    """

    def __init__(self, kubectl: Path, kubeconfig: Path) -> None:
        self.kubectl = kubectl
        self.kubeconfig = kubeconfig

    def run(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl with `text` on its stdin."""
        own = [f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.kubeconfig.parent / 'cache'}"]
        command = [str(self.kubectl), *own, *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    def dry_run(self, *documents: Document) -> subprocess.CompletedProcess[str]:
        """Ask the server whether it would take them; a warning counts as a no."""
        how = ("--dry-run=server", "--validate=strict", "--warnings-as-errors", "--filename=-")
        return self.run("apply", *how, text=yaml.safe_dump_all(documents))

    def make(self, *documents: Document) -> None:
        """Create them in earnest: what a dry run of others needs to find there."""
        made = self.run("create", "--filename=-", text=yaml.safe_dump_all(documents))
        assert made.returncode == 0, made.stderr


@contextmanager
def cluster(tools: Tools, folder: Path) -> Iterator[Cluster]:
    """Run etcd and kube-apiserver in `folder` until the block ends."""
    etcd, peer, port = _ports(3)
    token = secrets.token_hex(16)
    (folder / "tokens.csv").write_text(f"{token},administrator,0,system:masters\n")
    _write_key(folder / "service-accounts.pem")
    with ExitStack() as stack:
        stack.enter_context(_running(_etcd(tools, folder, etcd, peer), folder / "etcd.log"))
        command = _api_server(tools, folder, etcd, port)
        server = stack.enter_context(_running(command, folder / "kube-apiserver.log"))
        _wait(server, port, folder / "kube-apiserver.log")
        yield Cluster(tools.kubectl, _kubeconfig(folder, port, token))


def _etcd(tools: Tools, folder: Path, port: int, peer: int) -> list[str]:
    peers = f"http://127.0.0.1:{peer}"
    return [
        str(tools.etcd),
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        "--unsafe-no-fsync",
    ]


def _api_server(tools: Tools, folder: Path, etcd: int, port: int) -> list[str]:
    """With the admission plugins that are on by default; none is added or taken away."""
    key = folder / "service-accounts.pem"
    return [
        str(tools.api_server),
        f"--etcd-servers=http://127.0.0.1:{etcd}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={folder / 'certificates'}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",  # as clusters have it: it is for Pod Security to refuse
        "--service-cluster-ip-range=10.0.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
    ]


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # The kernel ends it with the tests, even where those are killed.
    mortal = ["setpriv", "--pdeathsig=KILL", *command]
    with (
        log.open("wb") as output,
        subprocess.Popen(mortal, stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.kill()  # nothing in it is worth an orderly end


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not _ready(port):
        assert server.poll() is None, f"kube-apiserver ended: {log.read_text()[-2000:]}"
        assert time.monotonic() < end, f"kube-apiserver is not ready: {log.read_text()[-2000:]}"
        time.sleep(0.2)


def _ready(port: int) -> bool:
    trusting = ssl._create_unverified_context()  # its certificate is made while it starts
    try:
        url = f"https://127.0.0.1:{port}/readyz"
        with urllib.request.urlopen(url, timeout=5, context=trusting) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _kubeconfig(folder: Path, port: int, token: str) -> Path:
    certificate = folder / "certificates/apiserver.crt"
    server = {"server": f"https://127.0.0.1:{port}", "certificate-authority": str(certificate)}
    path = folder / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": server}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path


def _write_key(path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in servers]
