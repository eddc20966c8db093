"""Debian's docker-registry on a free port of loopback, for tests that want a real one.

Owns: the server's process (ended by its process id, and by the kernel if the test process dies first), its
configuration and its storage, both in a temporary directory that goes with it. It never touches the packaged service or
its files. Use it from the main thread: the kernel ends the server together with the thread that started it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.parse
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

USER = "ann"
PASSWORD = "correct horse"
_BCRYPT = "$2b$04$b1myRj4NptfCzPdHV3jY3eEaw.LPlOwhy/P6/nuTsigRAhbBEdrzS"

_CONFIG = """\
version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {root}/data}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}", secret: nsfs}}
"""
_AUTH = """\
auth:
  htpasswd: {{realm: nsfs, path: {root}/htpasswd}}
"""

_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True)
class Registry:
    """A running server. `host` is what goes before the first slash of a reference."""

    host: str
    root: str
    """The temporary directory; the storage is `root`/data."""
    pid: int
    auth: bool

    @property
    def headers(self) -> dict[str, str]:
        """What a request needs to be let in."""
        if not self.auth:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}

    def blob_path(self, digest: str) -> str:
        """The file that stores a blob, to damage or remove it."""
        algorithm, _, digits = digest.partition(":")
        return f"{self.root}/data/docker/registry/v2/blobs/{algorithm}/{digits[:2]}/{digits}/data"


@contextmanager
def run_registry(*, auth: bool = False) -> Iterator[Registry]:
    """Start a server, wait until it answers, end it. With `auth` it lets in only USER with PASSWORD."""
    with tempfile.TemporaryDirectory(prefix="nsfs-registry-") as root:
        process, port = _start(root, auth=auth)
        try:
            yield Registry(f"127.0.0.1:{port}", root, process.pid, auth)
        finally:
            process.terminate()
            process.wait()


def push_layout(layout: str, registry: Registry, name: str, *, tag: str | None = None) -> list[str]:
    """Upload an OCI layout directory as repository `name`, byte for byte; returns the tags that it now has.

    Every manifest of index.json is pushed under its `org.opencontainers.image.ref.name`; `tag` replaces these, and is
    needed where index.json has one manifest without a name.
    """
    with open(f"{layout}/index.json", "rb") as file:
        roots = json.load(file)["manifests"]
    push = _Push(layout, registry, name)
    tags = []
    for root in roots:
        ref = tag or root.get("annotations", {}).get(_REF_NAME, root["digest"])
        push.manifest(root, ref)
        tags.append(ref)
    push.close()
    return tags


def _start(root: str, *, auth: bool) -> tuple[subprocess.Popen[bytes], int]:
    if auth:
        with open(f"{root}/htpasswd", "w") as file:
            file.write(f"{USER}:{_BCRYPT}\n")
    for _ in range(5):
        port = _free_port()
        with open(f"{root}/config.yml", "w") as file:
            file.write((_CONFIG + (_AUTH if auth else "")).format(root=root, port=port))
        command = ["setpriv", "--pdeathsig", "KILL", "/usr/bin/docker-registry", "serve", f"{root}/config.yml"]
        with open(f"{root}/log", "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if _wait_until_answering(process, port):
            return process, port
    with open(f"{root}/log") as file:
        raise RuntimeError(f"docker-registry does not start: {file.read()}")


def _free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_until_answering(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + 60
    while process.poll() is None:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", "/v2/")
                return connection.getresponse().status in {200, 401}
        except OSError:
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.02)
    process.wait()
    return False


@dataclass(slots=True)
class _Push:
    layout: str
    registry: Registry
    name: str
    connection: http.client.HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection(self.registry.host, timeout=60)

    def close(self) -> None:
        self.connection.close()

    def manifest(self, descriptor: Mapping[str, Any], ref: str) -> None:
        with self._open(descriptor["digest"]) as file:
            data = file.read()
        document = json.loads(data)
        for child in document.get("manifests", ()):
            self.manifest(child, child["digest"])
        self._blobs([*document.get("layers", ()), *([document["config"]] if "config" in document else ())])
        kind = descriptor.get("mediaType") or document.get("mediaType") or _MANIFEST
        self._send("PUT", f"/v2/{self.name}/manifests/{ref}", data, {"Content-Type": kind})

    def _blobs(self, descriptors: Sequence[Mapping[str, Any]]) -> None:
        for digest in {descriptor["digest"] for descriptor in descriptors}:
            if self._send("HEAD", f"/v2/{self.name}/blobs/{digest}", allowed={404})[0] == 404:
                self._blob(digest)

    def _blob(self, digest: str) -> None:
        _, location = self._send("POST", f"/v2/{self.name}/blobs/uploads/", b"")
        url = urllib.parse.urlsplit(location)
        target = f"{url.path}?{url.query}&digest={urllib.parse.quote(digest)}"
        with self._open(digest) as file:
            size = os.fstat(file.fileno()).st_size
            kind = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            self._send("PUT", target, file, kind)

    def _open(self, digest: str) -> IO[bytes]:
        return open(f"{self.layout}/blobs/{digest.replace(':', '/')}", "rb")

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        allowed: AbstractSet[int] = frozenset(),
    ) -> tuple[int, str]:
        self.connection.request(method, path, body, {**self.registry.headers, **(headers or {})})
        response = self.connection.getresponse()
        answer = response.read()
        if response.status >= 300 and response.status not in allowed:
            raise RuntimeError(f"{method} {path}: {response.status}: {answer[:500]!r}")
        return response.status, response.getheader("Location", "")
