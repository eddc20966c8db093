"""A registry that fails on purpose, in threads of this process, on loopback.

`FakeRegistry` serves documents and blobs from memory over HTTP/1.1 with keep-alive. Its `script` says what goes wrong,
one character per request for a blob (or for whatever `faults_on` matches), in order of arrival; after its end all is
well:

    .  well                                 R  200 and everything, the range ignored
    E  503                                  A  401, the token is void from now on
    T  headers, then silence                F  403, as for a signed URL that expired
    S  connection closed half-way           L  429, Retry-After in seconds
    C  one byte flipped in the middle       D  429, Retry-After as a date
    W  206 of another range                 X  connection reset before any answer
    H  half of it, then silence until `go_on` is set, then the rest
    O  one byte a second until `go_on` is set, then the rest

Blobs may be redirected to a second server (`redirect=True`), whose URLs carry a signature that `expire_urls` makes
void. Every request is logged with its headers and the number of body bytes sent.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from types import TracebackType

USER = "ann"
PASSWORD = "correct horse"
IDENTITY_TOKEN = "identity-of-ann"

_ADDRESSES = {"registry": "127.0.0.1", "storage": "127.0.0.2", "token": "127.0.0.3"}

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True, slots=True)
class Logged:
    """One request as it arrived."""

    server: str
    """registry, storage or token."""
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    fault: str
    status: int
    sent: int
    """Bytes of the body that were sent."""


@dataclass
class FakeRegistry:
    """Start it with `with`. Attributes may be changed between requests."""

    auth: str | None = None
    """None, "basic", or "token"."""
    redirect: bool = False
    script: str = ""
    faults_on: str = r"/blobs/|/storage/"
    retry_after: float = 1.0
    """Seconds, for L and D."""
    token_life: object = 300
    """What `expires_in` says."""
    chunked: bool = False
    """No Content-Length."""
    documents: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Body and media type by path."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    extra_headers: dict[str, str] = field(default_factory=dict)
    """Sent with every document and blob."""
    rights: dict[str, set[str]] = field(default_factory=dict)
    """With "basic": who, as `user:password`, may pull which repositories. Empty: ann, all of them."""
    members: dict[str, set[str]] = field(default_factory=dict)
    """Which blobs a repository has, by digest. Empty: each has all."""
    lies: bool = False
    """Says of every blob that it has it, in the `claimed` size, and gives zeros."""
    claimed: int = 0
    honest: set[str] = field(default_factory=set)
    """Digests of which it does not lie."""
    challenge: str | None = None
    """WWW-Authenticate, instead of the one that `auth` means."""
    certificate: str | None = None
    """PEM file of certificate and key; the registry (not storage nor token server) then speaks TLS."""
    client_ca: str | None = None
    """PEM file of the authority that client certificates must be signed by."""
    redirect_to: str | None = None
    """Location of every blob, instead of the second server."""
    log: list[Logged] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._servers: dict[str, _Server] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._tokens: set[str] = set()
        self._signature = 0
        self.closing = threading.Event()
        self.go_on = threading.Event()

    def __enter__(self) -> Self:
        for name in ("registry", "storage", "token"):
            server = _Server(self, name)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            self._servers[name] = server
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.go_on.set()
        for server in self._servers.values():
            server.shutdown()
            server.hang_up()
            server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def host(self) -> str:
        """What goes before the first slash of a reference."""
        return self.host_of("registry")

    def host_of(self, name: str) -> str:
        """Host and port of registry, storage or token server."""
        return f"{_ADDRESSES[name]}:{self._servers[name].server_address[1]}"

    def add_blob(self, data: bytes) -> dict[str, Any]:
        """Store a blob; returns its descriptor, as of a gzip layer."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return {"mediaType": OCI_GZIP, "digest": digest, "size": len(data)}

    def add_document(self, repository: str, reference: str, document: dict[str, Any] | bytes, media_type: str) -> str:
        """Store a manifest or index under a tag and its digest; returns the digest."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        for name in (reference, digest):
            self.documents[f"/v2/{repository}/manifests/{name}"] = (data, media_type)
        return digest

    def add_image(self, repository: str, tag: str, *layers: bytes) -> str:
        """Store an image whose layers are these bytes (and no tars); returns the manifest's digest."""
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Env": ["A=b"], "Cmd": ["/bin/true"]},
                "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(x).hexdigest() for x in layers]},
            }
        ).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {**self.add_blob(config), "mediaType": OCI_CONFIG},
            "layers": [self.add_blob(layer) for layer in layers],
        }
        return self.add_document(repository, tag, manifest, OCI_MANIFEST)

    def expire_tokens(self) -> None:
        """Make every token void."""
        with self._lock:
            self._tokens.clear()

    def expire_urls(self) -> None:
        """Make every signed URL void."""
        with self._lock:
            self._signature += 1

    def requests(self, server: str = "registry", path: str = "") -> list[Logged]:
        """What arrived at a server, in order, whose path matches the pattern."""
        with self._lock:
            return [entry for entry in self.log if entry.server == server and re.search(path, entry.path)]

    # What the handlers call, in their threads.

    def take_fault(self, path: str) -> str:
        with self._lock:
            if not self.script or not re.search(self.faults_on, path):
                return "."
            fault, self.script = self.script[0], self.script[1:]
            return fault

    def record(self, entry: Logged) -> None:
        with self._lock:
            self.log.append(entry)

    def issue_token(self) -> str:
        with self._lock:
            token = f"token-{len(self._tokens)}-{time.monotonic_ns()}"
            self._tokens.add(token)
            return token

    def lets_in(self, authorization: str | None, path: str) -> bool:
        if self.rights:
            said = base64.b64decode((authorization or "").removeprefix("Basic ")).decode()
            return repository_of(path) in self.rights.get(said, set())
        if self.auth is None and self.challenge is None:
            return True
        if self.auth == "basic":
            return authorization == basic()
        with self._lock:
            return (authorization or "").removeprefix("Bearer ") in self._tokens

    def find_document(self, path: str, authorization: str | None) -> tuple[bytes, str] | None:
        return self.documents.get(path)

    def has(self, path: str) -> bool:
        """Whether the repository that `path` names has the blob that it names."""
        digest, repository = path.rpartition("/")[2], repository_of(path)
        return digest in self.blobs and (not self.members or digest in self.members.get(repository, set()))

    def challenge_for(self, path: str) -> str:
        if self.challenge is not None:
            return self.challenge
        if self.auth == "basic":
            return 'Basic realm="fake"'
        repository = repository_of(path)
        realm = f"http://{self.host_of('token')}/token"
        return f'Bearer realm="{realm}",service="fake",scope="repository:{repository}:pull"'

    def location_of(self, digest: str) -> str:
        if self.redirect_to is not None:
            return self.redirect_to
        with self._lock:
            return f"http://{self.host_of('storage')}/storage/{digest}?signature={self._signature}"

    def signature_is_valid(self, query: str) -> bool:
        with self._lock:
            return parse_qs(query).get("signature") == [str(self._signature)]


def repository_of(path: str) -> str:
    """The repository in the path of a request."""
    return path.removeprefix("/v2/").partition("/blobs/")[0].partition("/manifests/")[0]


def basic() -> str:
    """The header that lets ann in."""
    return "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, registry: FakeRegistry, name: str) -> None:
        self.registry = registry
        self.name = name
        self._open: set[socket.socket] = set()
        super().__init__((_ADDRESSES[name], 0), _Handler)
        if registry.certificate is not None and name == "registry":
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=registry.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED if registry.client_ca else ssl.CERT_NONE
            context.load_cert_chain(registry.certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up here as a matter of course."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def registry(self) -> FakeRegistry:
        return self.server.registry

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self._fault = self.registry.take_fault(url.path)
        if self._fault in _BEFORE_AUTH:
            _BEFORE_AUTH[self._fault](self)
        elif self.server.name == "token":
            self._serve_token(dict(parse_qs(url.query)))
        elif self.server.name == "storage":
            self._serve_storage(url.path, url.query)
        else:
            self._serve_registry(url.path)

    def do_HEAD(self) -> None:
        """What containerd's resolver asks of a document; never fails by script."""
        self._fault = "."
        self._serve_registry(urlsplit(self.path).path)

    def do_POST(self) -> None:
        self._fault = "."
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("refresh_token") == [IDENTITY_TOKEN] and form.get("grant_type") == ["refresh_token"]:
            self._serve_token(form)
        else:
            self._answer(401)

    def _serve_token(self, fields: dict[str, list[str]]) -> None:
        given = self.headers["Authorization"]
        if given is not None and given != basic():
            self._answer(401)
            return
        assert fields.get("scope", [":pull"])[0].endswith(":pull")
        answer = {"token": self.registry.issue_token(), "expires_in": self.registry.token_life}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _serve_storage(self, path: str, query: str) -> None:
        if self.registry.signature_is_valid(query):
            self._serve_blob(path.rpartition("/")[2])
        else:
            self._answer(403, b"<Error>Request has expired</Error>")

    def _serve_registry(self, path: str) -> None:
        if not self.registry.lets_in(self.headers["Authorization"], path):
            self._answer(401, b"{}", {"WWW-Authenticate": self.registry.challenge_for(path)})
        elif (found := self.registry.find_document(path, self.headers["Authorization"])) is not None:
            data, kind = found
            headers = {"Content-Type": kind, "Docker-Content-Digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}
            self._send_body(200, data, headers | self.registry.extra_headers)
        elif self.registry.lies and "/blobs/" in path and path.rpartition("/")[2] not in self.registry.honest:
            self._send_zeros()
        elif not self.registry.has(path):
            self._answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}')
        elif self.registry.redirect or self.registry.redirect_to is not None:
            self._answer(307, b"moved", {"Location": self.registry.location_of(path.rpartition("/")[2])})
        else:
            self._serve_blob(path.rpartition("/")[2])

    def _send_zeros(self) -> None:
        """Whatever was asked for, of whatever size: a lie that is as good as one can be."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "bytes=0-0")
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, 0)
        size = self.registry.claimed
        body = bytes(last - first + 1 if self.headers["Range"] else size)
        headers = {"Content-Range": f"bytes {first}-{last}/{size}"} if self.headers["Range"] else {}
        self._send_body(206 if headers else 200, body, headers)

    def _serve_blob(self, digest: str) -> None:
        data = self.registry.blobs[digest]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        headers = dict(self.registry.extra_headers)
        if wanted is None or self._fault == "R":
            self._send_body(200, data, headers)
            return
        first = int(wanted[1])
        last = min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if self._fault == "W":
            first, last = max(first - 1, 0), max(last - 1, 0)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send_body(206, data[first : last + 1], headers)

    def _send_body(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self._fault == "C":
            body = _flipped(body)
        if self._fault == "T":
            self._start(status, headers, len(body))
            self._log(status, 0)
            self.registry.closing.wait(30)
            self.close_connection = True
        elif self._fault == "H":
            self._start(status, headers, len(body))
            for part in (body[: len(body) // 2], body[len(body) // 2 :]):
                self.wfile.write(part)
                self._log(status, len(part))
                self.registry.go_on.wait(60)
        elif self._fault == "O":
            self._start(status, headers, len(body))
            self._drip(status, body)
        elif self._fault == "S":
            self._start(status, headers, len(body))
            self.wfile.write(body[: len(body) // 2])
            self._log(status, len(body) // 2)
            self.close_connection = True
        else:
            self._answer(status, body, headers)

    def _drip(self, status: int, body: bytes) -> None:
        sent = 0
        while sent < len(body) and not self.registry.go_on.wait(1):
            self.wfile.write(body[sent : sent + 1])
            sent += 1
        self.wfile.write(body[sent:])
        self._log(status, len(body))

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.command == "HEAD":
            self._log(status, 0)
            self._start(status, headers or {}, len(body))
            return
        self._log(status, len(body))
        self._start(status, headers or {}, len(body))
        if self.registry.chunked:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        self.wfile.write(body)

    def _start(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.registry.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _log(self, status: int, sent: int) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        entry = Logged(self.server.name, self.command, self.path, headers, self._fault, status, sent)
        self.registry.record(entry)

    def _refuse_for_a_while(self) -> None:
        seconds = self.registry.retry_after
        date = email.utils.formatdate(time.time() + seconds, usegmt=True)
        self._answer(429, b"{}", {"Retry-After": date if self._fault == "D" else f"{seconds:.0f}"})

    def _refuse_token(self) -> None:
        self.registry.expire_tokens()
        self._answer(401, b"{}", {"WWW-Authenticate": self.registry.challenge_for(urlsplit(self.path).path)})

    def _refuse_url(self) -> None:
        self._answer(403, b"<Error>Request has expired</Error>")

    def _fail(self) -> None:
        self._answer(503, b'{"errors":[{"code":"UNAVAILABLE","message":"try later"}]}')

    def _reset(self) -> None:
        self._log(0, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


_BEFORE_AUTH = {
    "E": _Handler._fail,
    "L": _Handler._refuse_for_a_while,
    "D": _Handler._refuse_for_a_while,
    "A": _Handler._refuse_token,
    "F": _Handler._refuse_url,
    "X": _Handler._reset,
}


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :] if data else data
