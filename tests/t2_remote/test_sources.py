"""The ordinary paths against a real docker-registry and a real layout directory, by one suite for both."""

from __future__ import annotations

import hashlib
import json
import os
import random
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

import registry as registries
from nsfs.core.ports import LocalBlob
from nsfs.errors import CorruptError, DeniedError, NotFoundError, NsfsError, UsageError
from nsfs.model import oci
from nsfs.model.digest import Digest
from nsfs.model.oci import Descriptor, Platform
from nsfs.remote.client import Patience
from nsfs.remote.credentials import Credential, DockerConfig
from nsfs.remote.reference import parse_reference
from nsfs.remote.source import open_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from nsfs.core.ports import Source

LAYERS = [random.Random(seed).randbytes(size) for seed, size in ((1, 5_000_000), (2, 0), (3, 70_000))]


class Layout:
    """Writes a layout: v1 is an image, multi an index of two platforms."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs/sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self.image = self.write_image()
        index = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_INDEX,
            "manifests": [{**self.image, "platform": {"os": "linux", "architecture": "amd64"}}],
        }
        self.multi = self.write(json.dumps(index).encode(), oci.OCI_INDEX)
        self.write_index([self.tagged(self.image, "v1"), self.tagged(self.multi, "multi")])

    def write(self, data: bytes, media_type: str) -> dict[str, Any]:
        digits = hashlib.sha256(data).hexdigest()
        (self.root / "blobs/sha256" / digits).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digits}", "size": len(data)}

    def write_image(self) -> dict[str, Any]:
        diff_ids = [Digest.of(layer) for layer in LAYERS]
        config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": self.write(json.dumps(config).encode(), oci.OCI_CONFIG),
            "layers": [self.write(layer, "application/vnd.oci.image.layer.v1.tar") for layer in LAYERS],
        }
        return self.write(json.dumps(manifest).encode(), oci.OCI_MANIFEST)

    def tagged(self, descriptor: dict[str, Any], tag: str) -> dict[str, Any]:
        return {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}

    def write_index(self, manifests: list[dict[str, Any]]) -> None:
        (self.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return Layout(tmp_path_factory.mktemp("layout"))


@pytest.fixture(scope="module", params=["registry", "registry with auth", "layout"])
def place(request: pytest.FixtureRequest, layout: Layout) -> Iterator[str]:
    """What goes before the tag in a reference."""
    if request.param == "layout":
        yield f"oci:{layout.root}"
        return
    with registries.run_registry(auth="auth" in request.param) as registry:
        registries.push_layout(str(layout.root), registry, "team/app")
        yield f"{registry.host}/team/app"


class Ann:
    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        assert host.startswith("127.0.0.1:")
        return Credential(registries.USER, registries.PASSWORD)


@asynccontextmanager
async def opened(text: str, **options: Any) -> AsyncIterator[Source]:
    async with open_source(parse_reference(text), **{"credentials": Ann(), "environment": {}, **options}) as source:
        yield source


def run(text: str, body: Callable[[Source], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        with trio.fail_after(30):
            async with opened(text, **options) as source:
                return await body(source)

    return trio.run(main)


async def layers_of(source: Source, tag: str = "v1") -> list[Descriptor]:
    return oci.parse_manifest(await source.manifest(tag)).layers


def test_an_image_by_tag_and_by_digest(place: str, layout: Layout) -> None:
    async def body(source: Source) -> None:
        by_tag = await source.manifest("v1")
        by_digest = await source.manifest(layout.image["digest"])
        assert (by_tag.digest, by_tag.media_type) == (layout.image["digest"], oci.OCI_MANIFEST)
        assert (by_digest.digest, by_digest.data) == (by_tag.digest, by_tag.data)
        manifest = oci.parse_manifest(by_tag)
        config = oci.parse_config(await source.read_blob(manifest.config, oci.MAX_CONFIG), manifest)
        assert [*config.diff_ids] == [Digest.of(layer) for layer in LAYERS]

    run(f"{place}:v1", body)


def test_an_index(place: str, layout: Layout) -> None:
    async def body(source: Source) -> None:
        index = oci.parse_document(await source.manifest("multi"))
        assert isinstance(index, oci.ImageIndex)
        chosen = oci.choose_platform(index, Platform("amd64", "linux"))
        assert chosen.digest == layout.image["digest"]
        oci.parse_manifest(await source.manifest(chosen.digest))

    run(f"{place}:multi", body)


def test_blobs_whole_and_in_pieces(place: str) -> None:
    async def body(source: Source) -> None:
        for layer, descriptor in zip(LAYERS, await layers_of(source), strict=True):
            blob = source.blob(descriptor)
            assert (blob.digest, blob.size) == (descriptor.digest, len(layer))
            for offset in {0, len(layer) // 3, len(layer)}:
                async with blob.stream(offset) as pieces:
                    assert b"".join([piece async for piece in pieces]) == layer[offset:]
                assert await blob.fetch(offset, min(1000, len(layer) - offset)) == layer[offset : offset + 1000]
            with pytest.raises(CorruptError):
                await blob.fetch(0, len(layer) + 1)

    run(f"{place}:v1", body)


def test_what_is_not_there(place: str) -> None:
    async def body(source: Source) -> None:
        with pytest.raises(NotFoundError):
            await source.manifest("v9")
        with pytest.raises(NotFoundError):
            await source.manifest("sha256:" + "0" * 64)
        absent = Descriptor(media_type="x", digest=Digest("sha256:" + "0" * 64), size=10)
        with pytest.raises(NotFoundError):
            await source.blob(absent).fetch(0, 10)
        with pytest.raises(NotFoundError):
            async with source.blob(absent).stream() as pieces:
                [piece async for piece in pieces]

    run(f"{place}:v1", body)


def test_a_size_that_is_a_lie(place: str) -> None:
    async def body(source: Source) -> None:
        (first, *_) = await layers_of(source)
        for size in (first.size + 1, first.size - 1):
            lie = Descriptor(media_type="x", digest=first.digest, size=size)
            with pytest.raises(CorruptError):
                await source.blob(lie).fetch(0, size)
            with pytest.raises(CorruptError):
                await source.read_blob(lie, 1 << 30)

    run(f"{place}:v1", body, patience=Patience(2, 0.01))


def test_bytes_are_counted() -> None:
    with registries.run_registry() as registry:

        async def body(source: Source) -> None:
            (first, *_) = await layers_of(source)
            before = source.statistics()
            await source.blob(first).fetch(5, 5000)
            after = source.statistics()
            assert (after.requests - before.requests, after.received - before.received) == (1, 5000)

        root = Path(registry.root) / "layout"
        registries.push_layout(str(Layout(root).root), registry, "a")
        run(f"{registry.host}/a:v1", body)


class TestRealRegistry:
    def test_nobody_and_somebody_else_are_denied(self, layout: Layout, tmp_path: Path) -> None:
        with registries.run_registry(auth=True) as registry:
            registries.push_layout(str(layout.root), registry, "team/app")
            wrong = tmp_path / "config.json"
            wrong.write_text(json.dumps({"auths": {registry.host: {"username": "ann", "password": "x"}}}))
            for credentials in (None, DockerConfig(str(wrong))):
                with pytest.raises(DeniedError):
                    run(f"{registry.host}/team/app:v1", layers_of, credentials=credentials)
            right = {"username": registries.USER, "password": registries.PASSWORD}
            wrong.write_text(json.dumps({"auths": {f"https://{registry.host}/v1/": right}}))
            assert run(f"{registry.host}/team/app:v1", layers_of, credentials=DockerConfig(str(wrong)))

    def test_a_damaged_blob_is_found_by_its_digest(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "layout")
        with registries.run_registry() as registry:
            registries.push_layout(str(layout.root), registry, "a")
            path = Path(registry.blob_path(layout.image["digest"]))
            config = json.loads(path.read_bytes())["config"]
            stored = Path(registry.blob_path(config["digest"]))
            stored.write_bytes(bytes([stored.read_bytes()[0] ^ 1]) + stored.read_bytes()[1:])

            async def body(source: Source) -> None:
                manifest = oci.parse_manifest(await source.manifest("v1"))
                with pytest.raises(CorruptError, match="digest"):
                    await source.read_blob(manifest.config, oci.MAX_CONFIG)

            run(f"{registry.host}/a:v1", body)


class TestLayout:
    def test_a_blob_is_read_where_it_is(self, layout: Layout) -> None:
        async def body(source: Source) -> None:
            blob = source.blob((await layers_of(source))[0])
            assert isinstance(blob, LocalBlob)
            assert blob.directory == str(layout.root)
            assert await blob.fetch(5, 10) == LAYERS[0][5:15]

        run(f"oci:{layout.root}:v1", body)

    def test_no_symlink_leads_out_of_it(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "l")
        path = layout.root / "blobs/sha256" / layout.image["digest"].partition(":")[2]
        path.rename(path.with_name("beside"))
        path.symlink_to("beside")
        run(f"oci:{layout.root}:v1", lambda source: source.manifest("v1"))
        path.unlink()
        (path.parent / "beside").rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
        with pytest.raises(NotFoundError, match="cannot be read"):
            run(f"oci:{layout.root}:v1", lambda source: source.manifest("v1"))

    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "index.json")
        with pytest.raises(NotFoundError, match="not a regular file"):
            run(f"oci:{tmp_path}", lambda source: source.manifest("v1"))

    def test_the_only_image_needs_no_tag(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "l")
        for manifests in ([layout.image], [layout.tagged(layout.image, "v1")], [layout.multi]):
            layout.write_index(manifests)
            run(f"oci:{layout.root}", lambda source: source.manifest(""))

    def test_several_images_need_one(self, layout: Layout) -> None:
        with pytest.raises(UsageError, match="2 images") as caught:
            run(f"oci:{layout.root}", lambda source: source.manifest(""))
        assert caught.value.hint == "tags: v1, multi"

    def test_tags_in_nested_indexes(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "l")
        nested = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [layout.tagged(layout.image, "deep")]}
        layout.write_index([layout.write(json.dumps(nested).encode(), oci.OCI_INDEX)])
        assert run(f"oci:{layout.root}", lambda source: source.manifest("deep")).digest == layout.image["digest"]

    def test_damage_is_found(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "l")
        path = layout.root / "blobs/sha256" / layout.image["digest"].partition(":")[2]
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(CorruptError, match="digest"):
            run(f"oci:{layout.root}", lambda source: source.manifest("v1"))

    @pytest.mark.parametrize("index", ["", "{", "[]", '{"schemaVersion":2}', '{"schemaVersion":2,"manifests":[{}]}'])
    def test_hostile_indexes(self, tmp_path: Path, index: str) -> None:
        (tmp_path / "index.json").write_text(index)
        with pytest.raises(CorruptError):
            run(f"oci:{tmp_path}", lambda source: source.manifest("v1"))

    def test_digests_lead_nowhere_else(self, tmp_path: Path) -> None:
        layout = Layout(tmp_path / "l")
        layout.write_index([{**layout.image, "digest": "sha256:../../index.json"}])
        with pytest.raises(CorruptError):
            run(f"oci:{layout.root}", lambda source: source.manifest("v1"))
        with pytest.raises(UsageError):
            run(f"oci:{layout.root}", lambda source: source.manifest("sha256:../../index.json"))

    def test_no_layout(self, tmp_path: Path) -> None:
        with pytest.raises(NsfsError, match="cannot be read"):
            run(f"oci:{tmp_path}/none", lambda source: source.manifest("v1"))
