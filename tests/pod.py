"""Runs a container of the manifests on this machine: its image's environment, user, volumes.

No registry of images is at hand, so the image's file system is stood in for: a read-only root with
the system's libraries, this Python and its packages, and deltawatch as the wheel that Dockerfile
builds. Everything else is read from Dockerfile and from the manifest. Namespaces are made with
`unshare`; without root's rights the pod's user is a name for one's own.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
IMAGE_FILES = "/opt/deltawatch"
PACKAGES = "/opt/packages"
RUN_SECONDS = 300
Document = dict[str, Any]


def instructions(name: str) -> list[str]:
    """What follows every Dockerfile instruction of this name in the last stage."""
    return [rest for word, rest in _stages()[-1] if word == name]


def copied() -> list[str]:
    """What Dockerfile takes from the repository."""
    builder = _stages()[-2]
    return [name for word, rest in builder if word == "COPY" for name in rest.split()[:-1]]


def environment() -> dict[str, str]:
    """What the image sets."""
    return dict(pair.split("=", 1) for rest in instructions("ENV") for pair in shlex.split(rest))


def _stages() -> list[list[tuple[str, str]]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    stages: list[list[tuple[str, str]]] = [[]]
    for word, _, rest in (line.partition(" ") for line in lines if line.strip()):
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, rest.strip()))
    return stages


def manifest(path: str) -> Document:
    """The one object of a file in k8s/."""
    document: Document = yaml.safe_load((ROOT / "k8s" / path).read_text())
    return document


@dataclass(frozen=True)
class Container:
    """One container of a pod, its volumes as folders here.

    Attributes:
      files: folder with the wheel, installed.
      volumes: where the volumes are, a folder each by the volume's name; made as they are needed.
      pod: the pod's `spec`.
      container: the container, a part of it.
      network: whether it has one besides its own loopback.
    """

    files: Path
    volumes: Path
    pod: Document
    container: Document
    network: bool = False

    def volume(self, name: str) -> Path:
        """The folder of a volume, which the pod's group may write, as the kubelet sees to it."""
        folder = self.volumes / name
        if not folder.exists():
            folder.mkdir(parents=True)
            self._share(folder, 0o2775)
        return folder

    def copy_in(self, source: Path, volume: str, name: str) -> None:
        """Copy a folder into a volume as the pod's own user, as `kubectl cp` does."""
        to = shutil.copytree(source, self.volume(volume) / name)
        if _privileged():
            for path in (to, *to.rglob("*")):
                os.chown(path, self.pod["securityContext"]["runAsUser"], -1)

    def put_secret(self, volume: str, name: str, text: str) -> None:
        """Put a file into a Secret's volume, for the pod's group only."""
        (mode,) = (
            each["secret"]["defaultMode"] for each in self.pod["volumes"] if each["name"] == volume
        )
        path = self.volume(volume) / name
        path.write_text(text)
        self._share(path, mode)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, to its end."""
        return subprocess.run(
            self._isolated(command), capture_output=True, text=True, timeout=RUN_SECONDS
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the container; signals to it reach the command itself."""
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self._isolated(command), **pipes)

    def _isolated(self, command: Sequence[str]) -> list[str]:
        root = self.volumes / ".root"
        root.mkdir(parents=True, exist_ok=True)
        apart = [*_apart(), *([] if self.network else ["--net"])]
        variables = [f"{name}={value}" for name, value in self._environment().items()]
        inside = [*self._as_user(), "env", "-i", *variables, *command]
        script = "\n".join(["set -eu", *self._mounts(root), *_enter(root), 'exec "$@"'])
        return [*apart, "sh", "-c", script, "sh", *inside]

    def _environment(self) -> dict[str, str]:
        threads = str(self.container["resources"]["requests"]["cpu"])
        return {**environment(), "OMP_NUM_THREADS": threads, "PYTHONPATH": IMAGE_FILES}

    def _as_user(self) -> list[str]:
        user, group = (self.pod["securityContext"][name] for name in ("runAsUser", "runAsGroup"))
        if not _privileged():
            return ["unshare", "--user", f"--map-user={user}", f"--map-group={group}"]
        rights = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *rights]

    def _mounts(self, root: Path) -> list[str]:
        """Shell commands that put the container's file system together at `root`."""
        mounts = [
            bind(Path("/usr"), root, "/usr"),
            bind(self._etc(), root, "/etc"),
            bind(Path(sys.base_prefix), root, sys.base_prefix),
            bind(Path(sys.prefix).resolve(), root, PACKAGES),
            bind(self.files, root, IMAGE_FILES),
            *(bind(Path(each), root, each, writable=True) for each in ("/proc", "/dev")),
        ]
        for mount in self.container["volumeMounts"]:
            writable = not mount.get("readOnly", False)
            mounts.append(bind(self.volume(mount["name"]), root, mount["mountPath"], writable))
        links = [f"ln -s usr{name} {root}{name}" for name in ("/bin", "/lib", "/lib64", "/sbin")]
        memory = f"mount -t tmpfs -o mode=755 tmpfs {root}"
        return [memory, *links, *mounts]

    def _etc(self) -> Path:
        etc = self.volumes / ".etc"
        etc.mkdir(exist_ok=True)
        shutil.copy("/etc/ld.so.cache", etc)
        user = self.pod["securityContext"]["runAsUser"]
        (etc / "passwd").write_text(f"deltawatch:x:{user}:{user}::/tmp:/usr/sbin/nologin\n")
        for mount in self.container["volumeMounts"]:
            if mount["mountPath"].startswith("/etc/"):
                (etc / mount["mountPath"].removeprefix("/etc/")).mkdir(parents=True, exist_ok=True)
        return etc

    def _share(self, path: Path, mode: int) -> None:
        if _privileged():
            os.chown(path, -1, self.pod["securityContext"]["fsGroup"])
        path.chmod(mode)


def _enter(root: Path) -> list[str]:
    """Shell commands that make `root` the only file system there is, not to be written."""
    # Not chroot: in one, the kernel lets nobody make the user namespace of `_as_user`.
    old = f"{root}/.old"
    return [
        f"mkdir {old}; mount -o remount,bind,ro {root}",
        f"cd {root}; pivot_root . .old; cd {instructions('WORKDIR')[0]}; umount --lazy /.old",
    ]


def bind(source: Path, root: Path, place: str, writable: bool = False) -> str:
    """Shell commands that show a folder at a place of the container."""
    at = shlex.quote(f"{root}{place}")
    shown = f"mkdir -p {at}; mount --rbind {shlex.quote(str(source))} {at}"
    return shown if writable else f"{shown}; mount -o remount,bind,ro,nosuid,nodev {at}"


def install(to: Path) -> None:
    """Build a wheel of what Dockerfile copies, and install it into a folder, without a network."""
    sources, wheels = to.with_name("sources"), to.with_name("wheels")
    sources.mkdir()
    for name in copied():
        path = ROOT / name
        shutil.copytree(path, sources / name) if path.is_dir() else shutil.copy(path, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    made = ["wheel", "--no-build-isolation", f"--wheel-dir={wheels}", str(sources)]
    subprocess.run([*pip, *made, *offline], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", *offline, f"--target={to}", str(wheel)], check=True)
    script = to / "bin/deltawatch"
    _, _, rest = script.read_text().partition("\n")
    script.write_text(f"#!{PACKAGES}/bin/python\n{rest}")


def refused() -> str:
    """What the kernel says to a container of this user; "": nothing. Some let only root."""
    mount = ["sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run([*_apart(), "--net", *mount], capture_output=True, text=True).stderr


def _apart() -> list[str]:
    return ["unshare", "--mount", *([] if _privileged() else ["--map-root-user"])]


def _privileged() -> bool:
    return os.geteuid() == 0
