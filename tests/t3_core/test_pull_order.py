"""Pulling through a snapshotter that has some layers already: what is fetched, in which order, and what fails."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from images import Image, Layer, file, gzip_layer, tar_layer, write_oci_layout
from nsfs.core.pull import Mounts, PullWish, pull
from nsfs.errors import CorruptError, ExistsError, NotFoundError, UnreachableError
from nsfs.model.digest import Digest
from nsfs.model.oci import Descriptor, Platform
from nsfs.remote.layout import LayoutDirectory, LayoutSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from nsfs.core.ports import Blob
    from nsfs.model.oci import Document, Traffic
    from nsfs.model.pull import Content, PullReport
    from nsfs.model.referrers import Referrer
    from nsfs.model.report import Progress

LAYERS = [gzip_layer([file(f"f{number}", b"%d" % number)]) for number in range(6)]


class Source:
    """A layout that remembers which layers were asked for."""

    def __init__(self, directory: str) -> None:
        self._layout = LayoutSource(directory, LayoutDirectory(directory))
        self.asked: list[Digest] = []

    async def manifest(self, identifier: str) -> Document:
        return await self._layout.manifest(identifier)

    def blob(self, descriptor: Descriptor) -> Blob:
        self.asked.append(descriptor.digest)
        return self._layout.blob(descriptor)

    async def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        return await self._layout.read_blob(descriptor, limit)

    async def referrers(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        return await self._layout.referrers(subject, artifact_type)

    def statistics(self) -> Traffic:
        return self._layout.statistics()


class Writer:
    def __init__(self, store: FakeContainerd, content: Content) -> None:
        self._store = store
        self._content = content
        self._data = bytearray()

    @property
    def offset(self) -> int:
        return len(self._data)

    async def write(self, data: bytes) -> None:
        self._data += data

    async def commit(self) -> None:
        if Digest.of(bytes(self._data)) != self._content.digest:
            raise CorruptError("not what its digest says")
        self._store.blobs[self._content.digest] = dict(self._content.labels)


@dataclass
class FakeContainerd:
    """One namespace in memory; its snapshotter has the layers in `lazy` and needs no blob of them."""

    tars: Mapping[Digest, Digest]
    """Diff ID by blob, for `apply`."""
    lazy: set[Digest] = field(default_factory=set)
    vanish: int = 0
    """So many times a snapshot that is said to be there is not."""
    blobs: dict[Digest, dict[str, str]] = field(default_factory=dict)
    snapshots: dict[str, str] = field(default_factory=dict)
    """Parent by name."""
    active: dict[str, str] = field(default_factory=dict)
    images: dict[str, Descriptor] = field(default_factory=dict)
    leases: int = 0

    async def has_snapshotter(self, name: str) -> bool:
        return name == "nsfs"

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[None]:
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1

    async def labels(self, digest: Digest) -> dict[str, str] | None:
        return self.blobs.get(digest)

    async def set_labels(self, digest: Digest, labels: Mapping[str, str]) -> None:
        self.blobs[digest].update(labels)

    @asynccontextmanager
    async def writer(self, content: Content) -> AsyncIterator[Writer]:
        assert self.leases
        if content.digest in self.blobs:
            raise ExistsError("it is there")
        yield Writer(self, content)

    async def has_snapshot(self, snapshotter: str, name: str) -> bool:
        assert snapshotter == "nsfs"
        return name in self.snapshots

    async def prepare(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> Mounts:
        assert self.leases
        assert not parent or parent in self.snapshots
        name = labels["containerd.io/snapshot.ref"]
        if name in self.snapshots:
            raise ExistsError("it is there")
        if Digest(labels["containerd.io/snapshot/cri.layer-digest"]) in self.lazy:
            if self.vanish:
                self.vanish -= 1
            else:
                self.snapshots[name] = parent
            raise ExistsError("the snapshotter has it")
        self.active[key] = parent
        return Mounts(key.encode())

    async def apply(self, descriptor: Descriptor, mounts: Mounts) -> Digest:
        assert mounts.decode() in self.active
        assert descriptor.digest in self.blobs
        return self.tars[descriptor.digest]

    async def commit(self, snapshotter: str, name: str, key: str, labels: Mapping[str, str]) -> None:
        assert labels["containerd.io/snapshot.ref"] == name
        if name in self.snapshots:
            raise ExistsError("it is there")
        self.snapshots[name] = self.active.pop(key)

    async def remove(self, snapshotter: str, key: str) -> None:
        self.active.pop(key, None)

    async def put_image(self, name: str, target: Descriptor) -> None:
        self.images[name] = target


@dataclass
class Scene:
    containerd: FakeContainerd
    source: Source
    image: Image

    def pull(self, snapshotter: str = "nsfs", known: Sequence[Layer] = ()) -> PullReport:
        wish = PullWish(
            name="r/app:1",
            registry="r",
            repository="app",
            identifier="latest",
            platform=Platform("amd64", "linux"),
            namespace="default",
            snapshotter=snapshotter,
            lazy=frozenset(layer.digest for layer in known),
        )
        self.told: list[Progress] = []
        return trio.run(pull, wish, self.source, self.containerd, self.told.append)


def scene(directory: Path, image: Image, lazy: Sequence[Layer] = ()) -> Scene:
    containerd = FakeContainerd({layer.digest: layer.diff_id for layer in image.layers})
    containerd.lazy = {layer.digest for layer in lazy}
    return Scene(containerd, Source(str(write_oci_layout(directory, image))), image)


def how(report: PullReport) -> list[str]:
    return [layer.how for layer in report.layers]


def test_a_lazy_image_costs_its_documents(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS), lazy=LAYERS)
    assert how(stage.pull()) == ["lazy"] * 6
    assert stage.source.asked == []
    assert set(stage.containerd.blobs) == {stage.image.digest, Digest.of(stage.image.config_blob)}
    assert stage.containerd.images["r/app:1"].digest == stage.image.digest
    top = list(stage.containerd.snapshots)[-1]
    assert stage.containerd.blobs[Digest.of(stage.image.config_blob)]["containerd.io/gc.ref.snapshot.nsfs"] == top


def test_what_is_known_to_be_lazy_is_not_fetched_for_the_sake_of_one_that_is_not(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS), lazy=[*LAYERS[:2], *LAYERS[3:]])
    assert how(stage.pull(known=[*LAYERS[:2], *LAYERS[3:]])) == ["lazy", "lazy", "unpacked", "lazy", "lazy", "lazy"]
    assert stage.source.asked == [LAYERS[2].digest]


def test_a_layer_thought_lazy_that_is_not_is_fetched_in_its_turn(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS), lazy=LAYERS[:5])
    assert how(stage.pull(known=LAYERS))[-2:] == ["lazy", "unpacked"]
    assert stage.source.asked == [LAYERS[5].digest]


def test_a_layer_that_comes_twice_is_fetched_once(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image([LAYERS[0], LAYERS[1], LAYERS[0]]))
    assert how(stage.pull()) == ["unpacked"] * 3
    assert sorted(stage.source.asked) == sorted([LAYERS[0].digest, LAYERS[1].digest])
    assert len(stage.containerd.snapshots) == 3


def test_a_second_pull_finds_everything(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS), lazy=LAYERS[:3])
    stage.pull()
    stage.source.asked.clear()
    assert how(stage.pull()) == ["present"] * 6
    assert stage.source.asked == []


def test_a_snapshot_that_vanishes_is_asked_for_again(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS), lazy=LAYERS)
    stage.containerd.vanish = 2
    assert how(stage.pull()) == ["lazy"] * 6
    stage = scene(tmp_path, Image(LAYERS), lazy=LAYERS)
    stage.containerd.vanish = 3
    with pytest.raises(UnreachableError, match="has it not"):
        stage.pull()
    assert (stage.containerd.images, stage.containerd.leases) == ({}, 0)


def test_a_lie_about_a_tar_leaves_no_snapshot_of_it(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS))
    stage.containerd.tars = {layer.digest: tar_layer([]).diff_id for layer in LAYERS}
    with pytest.raises(CorruptError, match="configuration lies"):
        stage.pull()
    containerd = stage.containerd
    assert (containerd.snapshots, containerd.active, containerd.images, containerd.leases) == ({}, {}, {}, 0)


def test_an_unknown_snapshotter_is_noticed_before_anything_is_fetched(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS))
    with pytest.raises(NotFoundError, match="no such snapshotter: other"):
        stage.pull("other")
    assert stage.containerd.blobs == {}


def test_every_layer_that_is_fetched_says_how_far_it_is(tmp_path: Path) -> None:
    stage = scene(tmp_path, Image(LAYERS))
    stage.pull()
    for layer in LAYERS:
        said = [one for one in stage.told if one.what == layer.digest.hex[:12]]
        assert [one.stage for one in said] == ["fetch"] * (len(said) - 1) + ["unpack"]
        assert said[0].done == 0
        assert said[-1].done == said[-1].total == len(layer.blob)
