"""From references to images, and from digests to bytes: who is asked, what is believed, and what memory is for."""

from collections.abc import Sequence

import pytest
import trio
from msgspec.structs import replace

from core_sources import FakeLocalBlob, FakeMemory, FakeSource, FakeSources, digest_of
from nsfs.core.blobs import Blobs
from nsfs.core.images import Image, Images, ListedLayer
from nsfs.core.ports import LocalBlob
from nsfs.errors import CorruptError, DeniedError, NotFoundError, NsfsError, UnreachableError
from nsfs.format.artifact import (
    ARTIFACT_TYPE,
    CREATED,
    INDEX_TYPE,
    PROMISE,
    SPANS_TYPE,
    PromisedPack,
    plan_artifact,
    render_manifest,
)
from nsfs.model.digest import Digest
from nsfs.model.oci import OCI_INDEX, OCI_MANIFEST, Descriptor, Document, Platform
from nsfs.model.pool import Access
from nsfs.model.referrers import Referrer
from trio_tests import run

AMD64 = Platform("amd64", "linux")


class Site:
    def __init__(self) -> None:
        self.registry = FakeSource("registry/app")
        self.memory = FakeMemory()
        self.images = Images(FakeSources(self.registry), self.memory, AMD64)

    async def resolve(self, version: str = ":latest", platform: str | None = None, trust: str = "off") -> Image:
        return await self.images.resolve("registry/app" + version, platform, trust=trust)

    def attach(
        self, image: Digest, layer: Digest, created: str, *, about: Digest | None = None, pack: str = ""
    ) -> Digest:
        """An artifact beside the image; `about` which one it says it is, if that is another.

        `pack` is what its entry in the list promises.
        """
        part = Descriptor(media_type=SPANS_TYPE, digest=digest_of(b"spans"), size=5)
        index = Descriptor(media_type=INDEX_TYPE, digest=digest_of(created.encode()), size=7)
        artifact = plan_artifact(image, [(index, layer), (part, layer)], created)
        data = render_manifest(artifact, Descriptor(media_type=OCI_MANIFEST, digest=about or image, size=1))
        digest = digest_of(data)
        self.registry.documents[digest] = Document(data, OCI_MANIFEST, digest)
        listed = Referrer(media_type=OCI_MANIFEST, digest=digest, size=len(data), artifact_type=ARTIFACT_TYPE)
        self.registry.attached.setdefault(image, []).append(
            replace(listed, annotations={CREATED: created} | ({PROMISE: pack} if pack else {}))
        )
        return digest


class Heard:
    """`Ahead`, who does nothing about it."""

    def __init__(self) -> None:
        self.layers: list[tuple[str, list[Digest]]] = []
        self.packs: list[PromisedPack] = []

    def expect(self, layers: Sequence[ListedLayer], repository: str) -> None:
        self.layers.append((repository, [layer.digest for layer in layers]))

    def expect_pack(self, promised: PromisedPack, repository: str, access: Access) -> None:
        assert (repository, access.owner) == ("registry/app", "")
        self.packs.append(promised)


def entry(digest: Digest, machine: str, kind: str = OCI_MANIFEST) -> dict[str, object]:
    return {"mediaType": kind, "digest": digest, "size": 1, "platform": {"architecture": machine, "os": "linux"}}


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_an_image_is_its_documents(algorithm: str) -> None:
    async def body() -> None:
        site = Site()
        digest = site.registry.add_image("latest", [b"base", b"top"], algorithm)
        fresh = await site.resolve()
        site.registry.error = UnreachableError("down")
        for image in (fresh, await site.resolve()):
            assert image.digest == digest
            assert [layer.digest for layer in image.layers] == [digest_of(x, algorithm) for x in (b"base", b"top")]
            assert [layer.diff_id for layer in image.layers] == [
                digest_of(x, algorithm) for x in (b"stream of base", b"stream of top")
            ]
            assert (image.reference, image.repository, image.size) == ("registry/app:latest", "registry/app", 7)

    run(body)


def test_who_wants_layers_hears_of_them_before_the_configuration_is_there() -> None:
    async def body() -> None:
        site = Site()
        site.registry.add_image("latest", [b"base", b"top"])
        ahead = Heard()

        async def resolve(platform: str | None = None, trust: str = "off") -> None:
            await site.images.resolve("registry/app:latest", platform, trust=trust, ahead=ahead)

        await resolve("linux/amd64")
        site.memory.images.clear()
        await resolve(trust="same-repository")
        assert ahead.layers == [], (
            "a configuration may say that it is another platform's, an artifact how they are read"
        )
        site.memory.images.clear()
        for _ in range(2):
            await resolve()
        found = [("registry/app", [digest_of(b"base"), digest_of(b"top")])]
        assert ahead.layers == found, "what is remembered is no news"
        assert ahead.packs == []

    run(body)


def test_who_wants_a_pack_hears_of_it_while_its_artifact_is_asked_for() -> None:
    async def body() -> None:
        site, ahead = Site(), Heard()
        digest = site.registry.add_image("latest", [b"base"])
        for created, pack in (("2026-01-01", "old"), ("2026-03-01", "new"), ("2026-02-01", "other")):
            site.attach(digest, digest_of(b"base"), created, pack=f"{digest_of(pack.encode())} 9 4")

        async def resolve(trust: str, platform: str | None = None) -> None:
            site.memory.images.clear()
            await site.images.resolve(f"registry/app@{digest}", platform, trust=trust, ahead=ahead)

        await resolve("off")
        await resolve("same-repository", "linux/amd64")
        assert ahead.packs == []
        await resolve("same-repository")
        assert [each.pack.digest for each in ahead.packs] == [digest_of(b"new")]
        await site.images.resolve(f"registry/app@{digest}", None, trust="same-repository", ahead=ahead)
        assert len(ahead.packs) == 1, "what is believed already is no news"

    run(body)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_an_image_named_by_its_digest_needs_its_registry_once(algorithm: str) -> None:
    async def body() -> None:
        site = Site()
        digest = site.registry.add_image("latest", [b"base"], algorithm)
        for _ in range(2):
            image = await site.images.pinned(f"registry/app@{digest}")
            assert image.digest == digest
            assert (await site.resolve(f"@{digest}")).stale == ""
            site.registry.error = UnreachableError("down")

    run(body)


def test_of_an_index_the_manifest_for_the_platform_is_taken() -> None:
    async def body() -> None:
        site = Site()
        machines = ("amd64", "arm64")
        digests = {each: site.registry.add_image("", [each.encode()], "sha512", each) for each in machines}
        inner = site.registry.add_index("", *(entry(digest, machine) for machine, digest in digests.items()))
        site.registry.add_index("latest", entry(inner, "amd64", OCI_INDEX), entry(digests["arm64"], "arm64"))
        assert (await site.resolve()).digest == digests["amd64"]
        assert (await site.resolve(platform="linux/arm64/v8")).digest == digests["arm64"]
        with pytest.raises(NotFoundError):
            await site.resolve(platform="linux/riscv64")

    run(body)


def test_indexes_that_never_end_are_refused() -> None:
    async def body() -> None:
        site = Site()
        digest = site.registry.add_image("", [b"base"])
        for _ in range(3):
            digest = site.registry.add_index("latest", entry(digest, "amd64", OCI_INDEX))
        with pytest.raises(CorruptError, match="nested"):
            await site.resolve()

    run(body)


def test_a_single_image_of_another_platform_is_refused_where_one_was_asked_for() -> None:
    async def body() -> None:
        site = Site()
        site.registry.add_image("latest", [b"base"], machine="arm64")
        assert (await site.resolve()).config.platform.architecture == "arm64"
        with pytest.raises(NotFoundError):
            await site.resolve(platform="linux/amd64")

    run(body)


@pytest.mark.parametrize("error", [DeniedError("no"), NotFoundError("gone"), CorruptError("bad")])
def test_memory_is_not_asked_where_a_registry_answers_no(error: NsfsError) -> None:
    async def body() -> None:
        site = Site()
        site.registry.add_image("latest", [b"base"])
        await site.resolve()
        site.registry.error = error
        with pytest.raises(type(error)):
            await site.resolve()

    run(body)


def test_memory_is_asked_where_a_registry_is_down_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        site = Site()
        site.registry.add_image("latest", [b"base"])
        site.registry.error = UnreachableError("down")
        with pytest.raises(UnreachableError):
            await site.resolve()
        site.registry.error = None
        assert (await site.resolve()).stale == ""
        site.registry.error = UnreachableError("down")
        assert (await site.resolve()).stale == "down"
        with pytest.raises(UnreachableError):
            await site.resolve(platform="linux/arm64")
        with pytest.raises(UnreachableError):
            await site.resolve(":other")
        assert "going on with what registry/app:latest was" in caplog.text

    run(body)


def test_a_tag_that_moved_is_followed_and_one_that_did_not_costs_one_document() -> None:
    async def body() -> None:
        site = Site()
        site.registry.add_image("latest", [b"old"])
        await site.resolve()
        await site.resolve()
        assert (len(site.registry.read), site.memory.puts) == (1, 1)
        site.registry.add_image("latest", [b"new"])
        image = await site.resolve()
        assert image.layers[0].digest == digest_of(b"new")
        assert (len(site.registry.read), site.memory.puts) == (2, 2)

    run(body)


# Blobs

DATA = bytes(range(100))
BLOB = digest_of(DATA)


class Places:
    """Three repositories that were all named as having one blob, the last one latest; the first has it."""

    def __init__(self, kind: type[FakeLocalBlob] | None = None) -> None:
        self.places = [FakeSource(name, *([kind] if kind else [])) for name in ("first", "second", "third")]
        self.places[0].add_blob(DATA)
        self.sources = FakeSources(*self.places)
        self.memory = FakeMemory()
        for place in self.places:
            self.memory.put_origin([BLOB], place.name)
        self.blobs = Blobs(self.sources, self.memory)
        self.blob = self.blobs.blob(BLOB, len(DATA))

    async def stream(self, offset: int = 0) -> bytes:
        async with self.blob.stream(offset) as pieces:
            return b"".join([piece async for piece in pieces])


def test_nothing_is_opened_before_bytes_are_wanted() -> None:
    assert Places().sources.opened == []


@pytest.mark.parametrize("error", [DeniedError("no"), UnreachableError("down"), CorruptError("bad"), None])
def test_where_the_latest_repository_fails_earlier_ones_are_asked(error: NsfsError | None) -> None:
    async def body() -> None:
        site = Places()
        for place in site.places[1:]:
            place.error = error
        assert await site.blob.fetch(10, 5) == DATA[10:15]
        assert await site.blob.fetch(20, 5) == DATA[20:25]
        assert await site.stream(30) == DATA[30:]
        assert [len(place.asked) for place in site.places] == [3, 1, 1], "who has it is asked first from then on"
        assert site.blobs.fetched[BLOB] == 80

    run(body)


def test_a_repository_that_is_named_anew_is_asked_first_again() -> None:
    async def body() -> None:
        site = Places()
        await site.blob.fetch(0, 1)
        site.places[2].add_blob(DATA)
        await site.blobs.add([BLOB], "third")
        await site.blob.fetch(0, 1)
        assert [len(place.asked) for place in site.places] == [1, 1, 2]

    run(body)


def test_what_was_remembered_last_is_not_remembered_again() -> None:
    async def body() -> None:
        site = Places()
        other = digest_of(b"other")
        site.memory.origin_puts.clear()
        await site.blobs.add([BLOB], "first")
        await site.blobs.add([BLOB, other], "first")
        await site.blobs.add([BLOB, other], "first", Access("anna"))
        assert site.memory.origin_puts == [[BLOB], [other]]
        await site.blobs.add([BLOB], "second")
        await site.blobs.add([BLOB], "first")
        await site.blobs.add([BLOB], "first", Access("anna", "0123456789abcdef"))
        await site.blobs.add([BLOB], "first", Access("bert", "0123456789abcdef"))
        assert site.memory.origin_puts[2:] == [[BLOB]] * 4

    run(body)


def test_a_stream_that_breaks_goes_on_elsewhere() -> None:
    async def body() -> None:
        site = Places()
        site.places[2].add_blob(DATA)
        site.places[2].error, site.places[2].gives = UnreachableError("broke"), 40
        assert await site.stream() == DATA
        assert site.places[0].asked == [(40, -1)]
        assert site.blobs.fetched[BLOB] == 100

    run(body)


def test_what_is_told_is_the_latest_repositorys_error_or_one_that_may_mend() -> None:
    async def body() -> None:
        site = Places()
        site.places[0].error = NotFoundError("first")
        site.places[2].error = DeniedError("third")
        with pytest.raises(DeniedError, match="third"):
            await site.blob.fetch(0, 1)
        site.places[1].error = UnreachableError("second")
        with pytest.raises(UnreachableError, match="second"):
            await site.blob.fetch(0, 1)
        with pytest.raises(UnreachableError, match="second"):
            await site.stream()

    run(body)


def test_a_blob_that_nobody_named_is_not_found() -> None:
    async def body() -> None:
        unknown = Places().blobs.blob(digest_of(b"unknown"), 7)
        with pytest.raises(NotFoundError, match="no repository is known"):
            await unknown.fetch(0, 1)

    run(body)


def test_a_layouts_blob_costs_no_network() -> None:
    async def body() -> None:
        site = Places(FakeLocalBlob)
        assert isinstance(site.places[0].blob(Descriptor(media_type="", digest=BLOB, size=len(DATA))), LocalBlob)
        assert await site.blobs.is_local(BLOB, len(DATA))
        assert await site.stream() == DATA
        assert site.blobs.fetched[BLOB] == 0
        far = Places()
        assert not await far.blobs.is_local(BLOB, len(DATA))

    run(body)


def test_open_blobs_are_bounded() -> None:
    async def body() -> None:
        site = Places()
        for number in range(2000):
            digest = digest_of(b"%d" % number)
            await site.blobs.add([digest], "first")
            site.places[0].blobs[digest] = b"x"
            await site.blobs.blob(digest, 1).fetch(0, 1)
        assert len(site.blobs._found) <= 1024

    run(body)


def claims(image: Image) -> list[str]:
    return [layer.claim.artifact if layer.claim else "" for layer in image.layers]


def test_the_newest_artifact_of_the_repository_is_believed_where_that_is_wished() -> None:
    async def body() -> None:
        site = Site()
        digest = site.registry.add_image("latest", [b"base", b"top"])
        base = digest_of(b"base")
        newest = site.attach(digest, base, "2026-02-02T00:00:00Z")
        old = site.attach(digest, base, "2026-01-01T00:00:00Z")
        site.attach(digest, base, "2026-03-03T00:00:00Z", about=digest_of(b"another image"))
        assert claims(await site.resolve()) == ["", ""]
        assert claims(await site.resolve(trust="same-repository")) == [newest, ""]
        assert claims(await site.resolve(trust=old)) == [old, ""]
        assert claims(await site.resolve(trust=digest_of(b"none"))) == ["", ""]
        assert claims(await site.images.pinned(f"registry/app@{digest}", trust="same-repository")) == [newest, ""]
        assert claims(await site.resolve(f"@{digest}")) == ["", ""]

    run(body)


@pytest.mark.parametrize("named", ["latest", "digest"])
def test_what_lies_beside_is_looked_for_while_the_image_is_asked_for(named: str) -> None:
    async def body() -> None:
        site = Site()
        digest = site.registry.add_image("latest", [b"base"])
        artifact = site.attach(digest, digest_of(b"base"), "2026-01-01T00:00:00Z")
        site.registry.delay = 1.0
        before = trio.current_time()
        image = await site.resolve(f"@{digest}" if named == "digest" else ":latest", trust="same-repository")
        assert claims(image) == [artifact]
        assert trio.current_time() - before == pytest.approx(2.0 if named == "digest" else 3.0)

    run(body)


def test_what_was_believed_is_believed_without_its_registry_and_nothing_is_asked_for_in_vain() -> None:
    async def body() -> None:
        site = Site()
        digest = site.registry.add_image("latest", [b"base"])
        assert claims(await site.resolve(trust="same-repository")) == [""]
        found = site.attach(digest, digest_of(b"base"), "2026-01-01T00:00:00Z")
        assert claims(await site.resolve(trust="same-repository")) == [""], "nobody looks again at once"
        await trio.sleep(61)
        assert claims(await site.resolve(trust="same-repository")) == [found]
        site.registry.attached.clear()
        site.registry.error = UnreachableError("down")
        assert claims(await site.resolve(trust="same-repository")) == [found]

    run(body)
