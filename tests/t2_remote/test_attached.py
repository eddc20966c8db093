"""Artifacts beside images: against a registry with the referrers API, one without, and one that is difficult."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from fakes import PASSWORD, USER, FakeRegistry
from goregistry import GoRegistry, go_registry_program, run_go_registry
from nsfs.errors import CorruptError, DeniedError, NotFoundError, UnreachableError, UnsupportedError
from nsfs.format.artifact import EMPTY
from nsfs.model.digest import Digest
from nsfs.model.oci import OCI_MANIFEST
from nsfs.model.referrers import Referrer, Upload, parse_referrers, plan_added, plan_removed, tag_of, upload_of
from nsfs.remote.client import Patience
from nsfs.remote.credentials import Credential
from nsfs.remote.reference import parse_reference
from nsfs.remote.source import open_source
from registry import Registry, run_registry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from nsfs.remote.attached import Attached

T = TypeVar("T")
KIND = "application/vnd.test.thing"

prepare = go_registry_program
"""See prepared."""


def run(body: Callable[[T], Awaitable[None]], subject: T) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            await body(subject)

    trio.run(limited)


class Ann:
    async def lookup(self, host: str, repository: str, *, again: bool) -> Credential | None:
        del host, repository, again
        return Credential(USER, PASSWORD)


@contextmanager
def api() -> Iterator[GoRegistry]:
    with run_go_registry() as registry:
        yield registry


@contextmanager
def tags() -> Iterator[Registry]:
    with run_registry() as registry:
        yield registry


def manifest(subject: Digest | None, kind: str, note: str) -> bytes:
    empty = {"mediaType": kind, "digest": str(Digest.of(EMPTY)), "size": len(EMPTY)}
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": kind,
        "config": empty,
        "layers": [empty],
        "annotations": {"note": note},
    }
    if subject is not None:
        document["subject"] = {"mediaType": OCI_MANIFEST, "digest": str(subject), "size": 7}
    return json.dumps(document).encode()


def entry(data: bytes, kind: str) -> Referrer:
    return Referrer(media_type=OCI_MANIFEST, digest=Digest.of(data), size=len(data), artifact_type=kind)


async def attach(attached: Attached, subject: Digest, kind: str, note: str) -> Digest:
    await attached.put_blob(Digest.of(EMPTY), upload_of(EMPTY))
    data = manifest(subject, kind, note)
    await attached.attach(data, OCI_MANIFEST, subject, entry(data, kind))
    return Digest.of(data)


def opened(host: str, **options: Any) -> Any:
    return open_source(parse_reference(f"{host}/team/app"), patience=Patience(2, 0.01), **options)


SUBJECT = Digest.of(b"some image")


@pytest.mark.parametrize("running", [api, tags])
def test_what_is_attached_is_found_until_it_is_taken_away(running: Any) -> None:
    async def check(host: str) -> None:
        async with opened(host) as source:
            assert await source.referrers(SUBJECT, KIND) == []
            first = await attach(source.attached, SUBJECT, KIND, "first")
            other = await attach(source.attached, SUBJECT, "application/vnd.other", "other")
            second = await attach(source.attached, SUBJECT, KIND, "second")
        async with opened(host) as source:
            assert {each.digest for each in await source.referrers(SUBJECT, KIND)} == {first, second}
            assert (await source.manifest(str(second))).digest == second
            await source.attached.detach(SUBJECT, first)
            assert {each.digest for each in await source.attached.referrers(SUBJECT)} == {second, other}
            with pytest.raises(NotFoundError):
                await source.manifest(str(first))

    with running() as registry:
        run(check, registry.host)


def test_a_registry_that_does_not_delete_says_so() -> None:
    async def check(host: str) -> None:
        async with opened(host) as source:
            digest = await attach(source.attached, SUBJECT, KIND, "stays")
            with pytest.raises(UnsupportedError, match="still there"):
                await source.attached.detach(SUBJECT, digest)

    with run_go_registry(deletes=False) as registry:
        run(check, registry.host)


def test_blobs_that_are_there_are_not_sent_again() -> None:
    async def check(registry: GoRegistry) -> None:
        sent: list[int] = []

        async def pieces() -> AsyncGenerator[bytes, None]:
            for number in range(10):
                sent.append(number)
                yield bytes([number]) * 1000

        data = b"".join(bytes([number]) * 1000 for number in range(10))
        async with opened(registry.host) as source:
            for _ in range(2):
                await source.attached.put_blob(Digest.of(data), Upload(len(data), pieces))
            assert sent == list(range(10))
            descriptor = entry(data, KIND)
            assert await source.read_blob(descriptor, 1 << 20) == data

    with run_go_registry() as registry:
        run(check, registry)


def test_with_a_password() -> None:
    async def check(host: str) -> None:
        async with opened(host) as source:
            with pytest.raises(DeniedError):
                await source.attached.put_blob(Digest.of(EMPTY), upload_of(EMPTY))
        async with opened(host, credentials=Ann()) as source:
            await attach(source.attached, SUBJECT, KIND, "mine")
            assert len(await source.referrers(SUBJECT, KIND)) == 1

    with run_registry(auth=True) as registry:
        run(check, registry.host)


def test_a_registry_that_answers_with_a_page_for_people_has_no_api() -> None:
    async def check(fake: FakeRegistry) -> None:
        fake.documents[f"/v2/team/app/referrers/{SUBJECT}?artifactType=application%2Fvnd.test.thing"] = (
            b"<html>log in",
            "text/html",
        )
        listed = plan_added(None, entry(b"thing", KIND))
        fake.add_document("team/app", tag_of(SUBJECT), listed, "application/vnd.oci.image.index.v1+json")
        async with opened(fake.host) as source:
            assert [each.digest for each in await source.referrers(SUBJECT, KIND)] == [Digest.of(b"thing")]

    with FakeRegistry() as fake:
        run(check, fake)


# A registry that is difficult


class Difficult(ThreadingHTTPServer):
    """Takes one blob; asks for tokens by scope, lets them expire half-way, and has its uploads elsewhere."""

    def __init__(self, *, elsewhere: str = "", fail: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.elsewhere = elsewhere
        self.fail = fail
        self.scopes: list[str] = []
        self.token = 0
        self.seen: list[tuple[str, str, str]] = []
        self.blob = b""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none."""


class Handler(BaseHTTPRequestHandler):
    server: Difficult
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        """Nobody reads it."""

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def let_in(self, action: str) -> bool:
        said = self.headers.get("Authorization", "")
        self.server.seen.append((self.command, self.path, said))
        if said == f"Bearer {action}-{self.server.token}":
            return True
        scope = f'Bearer realm="http://{self.server.host}/token",service="s",scope="repository:team/app:{action}"'
        self.answer(401, {"WWW-Authenticate": scope})
        return False

    def do_GET(self) -> None:
        scope = parse_qs(urlsplit(self.path).query)["scope"][0]
        self.server.scopes.append(scope)
        action = scope.rpartition(":")[2]
        self.answer(200, body=json.dumps({"token": f"{action}-{self.server.token}", "expires_in": 300}).encode())

    def do_HEAD(self) -> None:
        if self.let_in("pull"):
            self.answer(404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.let_in("pull,push"):
            self.server.token += 1  # void from here on: the PUT has to ask again
            self.answer(202, {"Location": f"{self.server.elsewhere}/upload/1?state=a%2Fb"})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.elsewhere and self.headers.get("Authorization"):
            self.answer(400, body=b"a secret for somebody else")
        elif self.server.elsewhere or self.let_in("pull,push"):
            self.server.fail -= 1
            if self.server.fail >= 0:
                self.answer(503)
                return
            self.server.blob = data
            self.server.seen.append(("PUT", self.path, self.headers.get("Authorization", "")))
            self.answer(201)


@contextmanager
def difficult(**options: Any) -> Iterator[Difficult]:
    with Difficult(**options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


DATA = b"a blob" * 100


async def put(server: Difficult) -> None:
    async with opened(server.host, credentials=Ann()) as source:
        await source.attached.put_blob(Digest.of(DATA), upload_of(DATA))


def test_a_token_that_expires_half_way_is_asked_for_again_and_never_for_more_than_is_done() -> None:
    with difficult(fail=1) as server:
        run(put, server)
        assert server.blob == DATA
        assert set(server.scopes) == {"repository:team/app:pull", "repository:team/app:pull,push"}
        path = server.seen[-1][1]
        assert path == f"/upload/1?state=a%2Fb&digest=sha256%3A{hashlib.sha256(DATA).hexdigest()}"


def test_an_upload_elsewhere_is_sent_no_secret() -> None:
    with difficult() as other:
        other.elsewhere = "itself"
        with difficult(elsewhere=f"http://{other.host}") as server:
            run(put, server)
        assert other.blob == DATA
        assert [said for _, _, said in other.seen] == [""]


@pytest.mark.parametrize(("elsewhere", "error"), [("ftp://x", CorruptError), ("http://127.0.0.1:1", UnreachableError)])
def test_an_upload_that_leads_nowhere_fails(elsewhere: str, error: type[Exception]) -> None:
    with difficult(elsewhere=elsewhere) as server, pytest.raises(error):
        run(put, server)


# Lists


def test_a_list_keeps_what_others_put_there() -> None:
    strange = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {"mediaType": "x/y", "digest": str(Digest.of(b"1")), "size": 1, "data": "e30=", "platform": {"os": "x"}}
        ],
        "annotations": {"kept": "yes"},
        "future": [1, 2],
    }
    ours = entry(b"ours", KIND)
    added = plan_added(json.dumps(strange).encode(), ours)
    assert plan_added(added, ours) == added
    assert [each.digest for each in parse_referrers(added)] == [Digest.of(b"1"), ours.digest]
    assert json.loads(plan_removed(added, ours.digest)) == strange


@pytest.mark.parametrize("data", [b"", b"[]", b'{"manifests": [{"digest": "sha256:x"}]}', b'{"manifests": 3}'])
def test_a_list_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        parse_referrers(data)
    with pytest.raises(CorruptError):
        plan_added(data, entry(b"ours", KIND))


def test_the_tag_of_a_list() -> None:
    assert tag_of(Digest.of(b"")) == f"sha256-{hashlib.sha256(b'').hexdigest()}"
    assert tag_of(Digest("sha512:" + "a" * 128)) == "sha512-" + "a" * 64
