"""What the client makes of a registry that fails: right bytes or a clear error, in bounded time, and never a secret
to anybody but the registry it belongs to.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

import fakes
from nsfs.errors import (
    CorruptError,
    DeniedError,
    NotFoundError,
    NsfsError,
    UnreachableError,
    UnsupportedError,
)
from nsfs.model.oci import MAX_CONFIG, Manifest, parse_config, parse_document, parse_manifest
from nsfs.remote import registry as registry_module
from nsfs.remote.client import Patience
from nsfs.remote.credentials import Credential
from nsfs.remote.reference import Reference, parse_reference
from nsfs.remote.registry import RegistrySource
from nsfs.remote.source import open_source
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from nsfs.remote.registry import RegistryBlob

LAYER = random.Random(7).randbytes(3_000_000)
QUICK = Timeouts(connect=2.0, read=0.4)
EAGER = Patience(attempts=4, first_delay=0.01, longest_delay=2.0)


class Ann:
    """Knows one password, and who asked for it."""

    def __init__(self, credential: Credential | None = None) -> None:
        self.credential = credential or Credential(fakes.USER, fakes.PASSWORD)
        self.asked: list[str] = []

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        self.asked.append(host)
        return self.credential


@pytest.fixture
def fake() -> Iterator[fakes.FakeRegistry]:
    with fakes.FakeRegistry() as registry:
        registry.add_image("team/app", "v1", LAYER)
        yield registry


@asynccontextmanager
async def opened(fake: fakes.FakeRegistry, **options: Any) -> AsyncIterator[RegistrySource]:
    reference = parse_reference(f"{fake.host}/team/app:v1")
    assert isinstance(reference, Reference)
    settings: dict[str, Any] = {"timeouts": QUICK, "patience": EAGER, "environment": {}, **options}
    async with open_source(reference, **settings) as source:
        assert isinstance(source, RegistrySource)
        yield source


async def manifest_of(source: RegistrySource) -> Manifest:
    return parse_manifest(await source.manifest("v1"))


async def layer_of(source: RegistrySource) -> RegistryBlob:
    return source.blob((await manifest_of(source)).layers[0])


async def read_stream(blob: RegistryBlob, offset: int = 0) -> bytes:
    async with blob.stream(offset) as pieces:
        return b"".join([piece async for piece in pieces])


def run(fake: fakes.FakeRegistry, body: Callable[[RegistrySource], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        with trio.fail_after(90):
            async with opened(fake, **options) as source:
                return await body(source)

    return trio.run(main)


async def fetch_some(source: RegistrySource) -> bytes:
    blob = await layer_of(source)
    return await blob.fetch(1_000_001, 500_000)


async def stream_all(source: RegistrySource) -> bytes:
    return await read_stream(await layer_of(source))


async def stream_rest(source: RegistrySource) -> bytes:
    return await read_stream(await layer_of(source), 1_000_000)


class TestWithoutFaults:
    def test_an_image_is_read(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            manifest = await manifest_of(source)
            config = parse_config(await source.read_blob(manifest.config, MAX_CONFIG), manifest)
            assert config.runtime.env == ["A=b"]
            assert await stream_all(source) == LAYER

        run(fake, body)

    def test_every_corner_of_a_blob(self, fake: fakes.FakeRegistry) -> None:
        size = len(LAYER)

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            for offset, length in ((0, 1), (size - 1, 1), (0, size), (0, 0), (size, 0), (77, 4096)):
                assert await blob.fetch(offset, length) == LAYER[offset : offset + length]
            for offset in (0, 1, size - 1, size):
                assert await read_stream(blob, offset) == LAYER[offset:]
            for offset, length in ((-1, 1), (size, 1), (0, size + 1), (5, -1)):
                with pytest.raises(CorruptError, match="reaches beyond"):
                    await blob.fetch(offset, length)

        run(fake, body)

    def test_chunked_answers(self, fake: fakes.FakeRegistry) -> None:
        fake.chunked = True

        async def body(source: RegistrySource) -> None:
            assert await fetch_some(source) == LAYER[1_000_001:1_500_001]
            assert await stream_all(source) == LAYER

        run(fake, body)

    def test_requests_are_counted(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            before = source.statistics()
            await blob.fetch(0, 1000)
            after = source.statistics()
            assert (after.requests - before.requests, after.received - before.received) == (1, 1000)

        run(fake, body)

    def test_one_range_identity_encoding_and_one_connection(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            for offset in range(0, 50_000, 10_000):
                await blob.fetch(offset, 100)

        run(fake, body)
        for entry in fake.requests(path="/blobs/"):
            assert entry.headers["accept-encoding"] == "identity"
            assert entry.headers["range"].count("-") == 1

    def test_many_fetches_at_once(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)

            async def one(offset: int) -> None:
                assert await blob.fetch(offset, 10_000) == LAYER[offset : offset + 10_000]

            async with trio.open_nursery() as nursery:
                for offset in range(0, 1_000_000, 10_000):
                    nursery.start_soon(one, offset)

        run(fake, body)


class TestTransientFaults:
    @pytest.mark.parametrize("fault", ["E", "T", "S", "R", "A", "F", "W", "X", "L", "D", "EEE", "XSW", "TE", "ER"])
    @pytest.mark.parametrize("redirect", [False, True])
    def test_a_fetch_has_the_right_bytes_in_the_end(self, fake: fakes.FakeRegistry, fault: str, redirect: bool) -> None:
        fake.auth, fake.redirect, fake.retry_after = "token", redirect, 1

        async def body(source: RegistrySource) -> bytes:
            blob = await layer_of(source)
            await blob.fetch(0, 10)
            fake.script = fault
            return await blob.fetch(1_000_001, 500_000)

        assert run(fake, body, credentials=Ann()) == LAYER[1_000_001:1_500_001]
        assert fake.script == ""

    @pytest.mark.parametrize("fault", ["E", "T", "S", "A", "F", "X", "L", "SSSSSS", "S.XSE", "SR"])
    @pytest.mark.parametrize("redirect", [False, True])
    def test_a_stream_has_the_right_bytes_in_the_end(
        self, fake: fakes.FakeRegistry, fault: str, redirect: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry_module, "_PROGRESS", 1000)
        fake.auth, fake.redirect, fake.retry_after = "token", redirect, 1
        fake.faults_on = "/storage/" if redirect else "/blobs/"

        async def body(source: RegistrySource) -> bytes:
            blob = await layer_of(source)
            await blob.fetch(0, 10)
            fake.script = fault
            return await read_stream(blob)

        assert run(fake, body, credentials=Ann()) == LAYER

    def test_a_stream_resumes_where_it_broke(self, fake: fakes.FakeRegistry) -> None:
        fake.script = "S"
        assert run(fake, stream_all) == LAYER
        first, second = fake.requests(path="/blobs/")
        assert "range" not in first.headers
        assert second.headers["range"] == f"bytes={first.sent}-{len(LAYER) - 1}"

    def test_retry_after_is_obeyed(self, fake: fakes.FakeRegistry) -> None:
        fake.script, fake.retry_after = "L", 1

        async def body(source: RegistrySource) -> float:
            start = trio.current_time()
            await fetch_some(source)
            return trio.current_time() - start

        assert run(fake, body) >= 1.0

    @pytest.mark.parametrize("fault", ["L", "D"])
    def test_a_long_wait_is_left_to_the_caller(self, fake: fakes.FakeRegistry, fault: str) -> None:
        fake.script, fake.retry_after = fault, 100
        with pytest.raises(UnreachableError, match="429") as caught:
            run(fake, fetch_some)
        assert caught.value.retry_after == pytest.approx(100, abs=3)
        assert len(fake.requests(path="/blobs/")) == 1


class TestLastingFaults:
    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            ("E", UnreachableError),
            ("T", UnreachableError),
            ("S", UnreachableError),
            ("X", UnreachableError),
            ("W", CorruptError),
            ("F", DeniedError),
        ],
    )
    @pytest.mark.parametrize("call", [fetch_some, stream_rest])
    def test_a_clear_error_in_bounded_time(
        self, fake: fakes.FakeRegistry, fault: str, error: type[NsfsError], call: Callable[..., Awaitable[bytes]]
    ) -> None:
        fake.script = fault * 100
        with pytest.raises(error) as caught:
            run(fake, call, timeouts=Timeouts(2.0, 0.1))
        assert "127.0.0.1" in caught.value.message or "bytes" in caught.value.message
        assert len(fake.requests(path="/blobs/")) < 20

    def test_nothing_listens(self) -> None:
        async def main() -> None:
            reference = parse_reference("127.0.0.1:1/a/b")
            async with open_source(reference, timeouts=QUICK, patience=EAGER, environment={}) as source:
                await source.manifest("v1")

        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
            trio.run(main)

    def test_what_does_not_exist(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            with pytest.raises(NotFoundError, match="v2"):
                await source.manifest("v2")
            blob = await layer_of(source)
            fake.blobs.clear()
            with pytest.raises(NotFoundError, match="BLOB_UNKNOWN"):
                await blob.fetch(0, 10)

        run(fake, body)
        assert len(fake.requests()) == 3

    def test_a_length_that_is_not_the_descriptors(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            fake.blobs[blob.digest] = LAYER + b"more"
            with pytest.raises(CorruptError):
                await read_stream(blob)
            with pytest.raises(CorruptError, match="descriptor says"):
                await blob.fetch(5, 5)
            fake.chunked = True
            with pytest.raises(CorruptError, match=r"more bytes|descriptor says"):
                await read_stream(blob)

        run(fake, body)


class TestIgnoredRanges:
    def test_a_far_range_is_given_up_and_asked_again_later(
        self, fake: fakes.FakeRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry_module, "MOST_SKIPPED", 100_000)
        monkeypatch.setattr(registry_module, "_IGNORED_FOR", 3.0)
        fake.script = "R" * 5

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            with pytest.raises(UnreachableError, match="ignores ranges"):
                await blob.fetch(200_000, 10)
            before = len(fake.log)
            with pytest.raises(UnreachableError, match="ignores ranges"):
                await blob.fetch(200_000, 10)
            assert len(fake.log) == before
            assert await blob.fetch(100_000, 10) == LAYER[100_000:100_010]
            fake.script = ""
            blob._without_ranges_until = 0
            assert await blob.fetch(200_000, 10) == LAYER[200_000:200_010]

        run(fake, body, patience=Patience(4, 0.01, 1.0))

    def test_what_follows_the_range_is_not_downloaded(self, fake: fakes.FakeRegistry) -> None:
        fake.script = "R"

        async def body(source: RegistrySource) -> int:
            blob = await layer_of(source)
            assert await blob.fetch(10, 10) == LAYER[10:20]
            return source.statistics().received

        assert run(fake, body) < 1_500_000


class TestAuthentication:
    @pytest.mark.parametrize("auth", ["basic", "token"])
    def test_with_a_password(self, fake: fakes.FakeRegistry, auth: str) -> None:
        fake.auth = auth
        ann = Ann()
        assert run(fake, stream_all, credentials=ann) == LAYER
        assert ann.asked == [fake.host]
        assert len(fake.requests("token")) == (auth == "token")

    def test_anonymous_token(self, fake: fakes.FakeRegistry) -> None:
        fake.auth = "token"
        assert run(fake, stream_all) == LAYER
        assert "authorization" not in fake.requests("token")[0].headers

    def test_identity_token(self, fake: fakes.FakeRegistry) -> None:
        fake.auth = "token"
        ann = Ann(Credential("", identity_token=fakes.IDENTITY_TOKEN))
        assert run(fake, stream_all, credentials=ann) == LAYER
        assert [entry.method for entry in fake.requests("token")] == ["POST"]

    @pytest.mark.parametrize("auth", ["basic", "token"])
    def test_a_wrong_password_is_denied_and_not_shown(self, fake: fakes.FakeRegistry, auth: str) -> None:
        fake.auth = auth
        with pytest.raises(DeniedError) as caught:
            run(fake, stream_all, credentials=Ann(Credential("ann", "hunter2")))
        assert "hunter2" not in repr(caught.value) + str(caught.value)

    def test_a_token_that_expires_is_renewed_before(self, fake: fakes.FakeRegistry) -> None:
        fake.auth, fake.token_life = "token", 1

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            await trio.sleep(1.0)
            await blob.fetch(0, 10)

        run(fake, body)
        assert len(fake.requests("token")) == 2
        assert [entry.status for entry in fake.requests()].count(401) == 1

    @pytest.mark.parametrize("life", [-1, 0, "soon", None, 1e300, 10**30, True, [1]])
    def test_absurd_lives(self, fake: fakes.FakeRegistry, life: object) -> None:
        fake.auth, fake.token_life = "token", life
        assert run(fake, fetch_some) == LAYER[1_000_001:1_500_001]
        assert len(fake.requests("token")) == 1

    def test_a_token_that_becomes_void_is_replaced_once_for_all(self, fake: fakes.FakeRegistry) -> None:
        fake.auth = "token"

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            fake.expire_tokens()
            async with trio.open_nursery() as nursery:
                for offset in range(10):
                    nursery.start_soon(blob.fetch, offset, 10)

        run(fake, body)
        assert len(fake.requests("token")) == 2

    @pytest.mark.parametrize(
        "challenge",
        ["", "Bearer", "Bearer realm=", 'Bearer realm="', "Negotiate", 'Bearer realm="ftp://x/"', "\x7f,,=", "Basic"],
    )
    def test_challenges_that_lead_nowhere(self, fake: fakes.FakeRegistry, challenge: str) -> None:
        fake.challenge = challenge
        with pytest.raises((DeniedError, UnreachableError)):
            run(fake, stream_all)

    def test_a_403_that_lasts_is_denied(self, fake: fakes.FakeRegistry) -> None:
        fake.script = "F" * 10
        with pytest.raises(DeniedError):
            run(fake, fetch_some)


class TestRedirects:
    def test_nothing_secret_crosses_to_another_host(self, fake: fakes.FakeRegistry) -> None:
        fake.auth, fake.redirect = "token", True
        assert run(fake, stream_all, credentials=Ann()) == LAYER
        assert fake.requests("storage")
        for entry in fake.requests("storage"):
            assert "authorization" not in entry.headers
            assert "cookie" not in entry.headers

    def test_the_target_is_used_again(self, fake: fakes.FakeRegistry) -> None:
        fake.redirect = True

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            for offset in range(5):
                await blob.fetch(offset, 10)

        run(fake, body)
        assert len(fake.requests(path="/blobs/")) == 1
        assert len(fake.requests("storage")) == 5

    def test_an_expired_target_is_resolved_again_once(self, fake: fakes.FakeRegistry) -> None:
        fake.redirect = True

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            await blob.fetch(0, 10)
            fake.expire_urls()
            assert await blob.fetch(5, 10) == LAYER[5:15]

        run(fake, body)
        assert len(fake.requests(path="/blobs/")) == 2

    @pytest.mark.parametrize("fault", ["X", "E", "W"])
    def test_a_target_that_fails_is_resolved_again(self, fake: fakes.FakeRegistry, fault: str) -> None:
        fake.redirect, fake.faults_on = True, "/storage/"

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            await blob.fetch(0, 10)
            fake.script = fault
            assert await blob.fetch(5, 10) == LAYER[5:15]

        run(fake, body)
        assert len(fake.requests(path="/blobs/")) == 2

    def test_circles_end(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            fake.redirect_to = f"http://{fake.host}/v2/team/app/blobs/{blob.digest}"
            with pytest.raises(UnreachableError, match="redirects without end"):
                await blob.fetch(0, 10)

        run(fake, body, patience=Patience(attempts=1))

    @pytest.mark.parametrize("location", ["", "ftp://x/y", "http://", "http://[/", "http://x:99999/", "https://\x01/"])
    def test_locations_that_are_no_urls(self, fake: fakes.FakeRegistry, location: str) -> None:
        fake.redirect_to = location
        with pytest.raises(NsfsError):
            run(fake, fetch_some, patience=Patience(attempts=1))


class TestDocuments:
    def test_a_damaged_manifest_is_asked_for_again(self, fake: fakes.FakeRegistry) -> None:
        fake.faults_on, fake.script = "/manifests/", "CC"
        digest = next(path for path in fake.documents if "sha256" in path).rpartition("/")[2]

        async def body(source: RegistrySource) -> None:
            assert (await source.manifest(digest)).digest == digest

        run(fake, body)

    def test_a_manifest_that_stays_damaged_is_corrupt(self, fake: fakes.FakeRegistry) -> None:
        fake.faults_on, fake.script = "/manifests/", "C" * 20
        digest = next(path for path in fake.documents if "sha256" in path).rpartition("/")[2]

        async def body(source: RegistrySource) -> None:
            with pytest.raises(CorruptError, match="does not match its digest"):
                await source.manifest(digest)

        run(fake, body)

    @pytest.mark.parametrize("claim", ["sha256:" + "0" * 64, "sha256:../../etc/passwd", "md5:00"])
    def test_the_registrys_own_claim_must_hold(self, fake: fakes.FakeRegistry, claim: str) -> None:
        fake.extra_headers["Docker-Content-Digest"] = claim

        async def body(source: RegistrySource) -> None:
            with pytest.raises(CorruptError, match="digest"):
                await source.manifest("v1")

        run(fake, body)

    def test_a_manifest_that_is_too_large(self, fake: fakes.FakeRegistry) -> None:
        fake.documents["/v2/team/app/manifests/v1"] = (b" " * (4 << 20) + b"{}", fakes.OCI_MANIFEST)

        async def body(source: RegistrySource) -> None:
            with pytest.raises(CorruptError, match="longer than"):
                await source.manifest("v1")

        run(fake, body)

    def test_a_damaged_config_is_asked_for_again(self, fake: fakes.FakeRegistry) -> None:
        fake.script = "C"

        async def body(source: RegistrySource) -> None:
            manifest = await manifest_of(source)
            parse_config(await source.read_blob(manifest.config, MAX_CONFIG), manifest)
            with pytest.raises(CorruptError, match="too large"):
                await source.read_blob(manifest.layers[0], 1000)

        run(fake, body)

    def test_an_encoding_nobody_asked_for(self, fake: fakes.FakeRegistry) -> None:
        fake.extra_headers["Content-Encoding"] = "gzip"

        async def body(source: RegistrySource) -> None:
            with pytest.raises(CorruptError, match="encoding"):
                await source.manifest("v1")

        run(fake, body)

    def test_a_type_that_is_not_the_documents(self, fake: fakes.FakeRegistry) -> None:
        path = "/v2/team/app/manifests/v1"
        fake.documents[path] = (fake.documents[path][0], "application/vnd.oci.image.index.v1+json")

        async def body(source: RegistrySource) -> None:
            with pytest.raises(CorruptError, match="served as"):
                parse_document(await source.manifest("v1"))

        run(fake, body)

    def test_a_400_is_not_tried_again(self, fake: fakes.FakeRegistry) -> None:
        fake.redirect_to = f"http://{fake.host}/nowhere"

        async def body(source: RegistrySource) -> None:
            with pytest.raises((NotFoundError, UnsupportedError)):
                await (await layer_of(source)).fetch(0, 10)

        run(fake, body)
        assert len(fake.log) == 3


class TestCancellation:
    def test_requests_given_up_cost_no_slots(self, fake: fakes.FakeRegistry) -> None:
        """More requests than slots are cancelled at every stage; afterwards all slots are free."""

        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            fake.script = "T" * 30
            with trio.move_on_after(0.2):
                async with trio.open_nursery() as nursery:
                    for _ in range(60):
                        nursery.start_soon(blob.fetch, 0, 1000)
            fake.script = ""
            for delay in (0.0, 0.0005, 0.001, 0.002, 0.004):
                with trio.move_on_after(delay):
                    async with trio.open_nursery() as nursery:
                        for _ in range(30):
                            nursery.start_soon(blob.fetch, 0, 1000)
            async with trio.open_nursery() as nursery:
                for _ in range(30):
                    nursery.start_soon(blob.fetch, 0, 1000)

        run(fake, body, timeouts=Timeouts(2.0, 5.0))

    def test_a_stream_left_early(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            for _ in range(20):
                async with blob.stream() as pieces:
                    async for _ in pieces:
                        break
            assert await read_stream(blob) == LAYER

        run(fake, body)

    def test_ranges_do_not_wait_behind_streams(self, fake: fakes.FakeRegistry) -> None:
        async def body(source: RegistrySource) -> None:
            blob = await layer_of(source)
            fake.script = "T" * 12
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(read_stream, blob)
                await trio.sleep(0.3)
                with trio.fail_after(10):
                    assert await blob.fetch(7, 7) == LAYER[7:14]
                nursery.cancel_scope.cancel()

        run(fake, body, timeouts=Timeouts(20.0, 60.0))
