"""Worlds in which one tenant attacks another: one that believes whatever it is told, and a real node.

An attack pulls images for tenants and reads files of them. `Naive` is a lazy snapshotter without suspicion: there an
attack must work, so that its failing elsewhere means something. `Tenants` carries out the same through containerd.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from images import Image, Layer
from nsfs.model.digest import Digest, chain_ids
from published import TOC_DIGEST

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from containerd import Containerd
    from fakes import FakeRegistry

Files = dict[str, bytes]


class RefusedError(Exception):
    """A world does not do what it was asked; says what the tenant hears."""


class World(Protocol):
    """Where an attack takes place."""

    def pull(self, tenant: str, reference: str) -> None:
        """Get an image; raises RefusedError."""

    def read(self, tenant: str, reference: str, path: str) -> bytes:
        """A file of it, as a container of the tenant's sees it; raises RefusedError."""


def pretending(victim: Image, own: Layer) -> Image:
    """An image whose configuration says the victim's diff IDs, and whose top layer is of one's own."""
    top = Layer(victim.layers[-1].tar, own.blob, own.media_type, own.annotations)
    return Image((*victim.layers[:-1], top))


@dataclass
class Naive:
    """Finds layers by chain ID, blobs by digest, tables by blob and contents by claimed digests, for all tenants."""

    registries: Sequence[FakeRegistry]
    _layers: dict[str, Files] = field(default_factory=dict)
    _blobs: dict[str, bytes] = field(default_factory=dict)
    _tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _contents: dict[str, bytes] = field(default_factory=dict)

    def pull(self, tenant: str, reference: str) -> None:
        registry, manifest, chains = self._documents(reference)
        for layer, chain in zip(manifest["layers"], chains, strict=True):
            if chain not in self._layers:
                self._layers[chain] = self._unpack(registry, reference, layer)

    def read(self, tenant: str, reference: str, path: str) -> bytes:
        *_, chains = self._documents(reference)
        for chain in reversed(chains):
            if path.lstrip("/") in self._layers[chain]:
                return self._layers[chain][path.lstrip("/")]
        raise RefusedError(f"no such file: {path}")

    def _documents(self, reference: str) -> tuple[FakeRegistry, dict[str, Any], list[str]]:
        host, _, rest = reference.partition("/")
        name, _, tag = rest.rpartition(":")
        (registry,) = (each for each in self.registries if each.host == host)
        manifest = json.loads(registry.documents[f"/v2/{name}/manifests/{tag}"][0])
        config = json.loads(registry.blobs[manifest["config"]["digest"]])
        return registry, manifest, [str(chain) for chain in chain_ids(config["rootfs"]["diff_ids"])]

    def _unpack(self, registry: FakeRegistry, reference: str, layer: Mapping[str, Any]) -> Files:
        digest = layer["digest"]
        if digest not in self._blobs:
            if digest not in registry.blobs:
                raise RefusedError(f"no such blob: {digest}")
            self._blobs[digest] = registry.blobs[digest]
        blob = self._blobs[digest]
        if TOC_DIGEST not in layer.get("annotations", {}):
            files = _files(zlib.decompress(blob, 31))
            self._contents |= {str(Digest.of(data)): data for data in files.values()}
            return files
        table = self._tables.setdefault(digest, _external(registry, reference) or _embedded(blob))
        return {row["name"]: self._content(blob, row) for row in table if row["type"] == "reg"}

    def _content(self, blob: bytes, row: Mapping[str, Any]) -> bytes:
        if row["digest"] not in self._contents:
            stream = zlib.decompressobj(31).decompress(blob[row["offset"] :])
            self._contents[row["digest"]] = stream[: row["size"]]
        return self._contents[row["digest"]]


def _files(tar: bytes) -> Files:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        opened = ((member.name, archive.extractfile(member)) for member in archive if member.isreg())
        return {name: file.read() for name, file in opened if file is not None}


def _embedded(blob: bytes) -> list[dict[str, Any]]:
    """The rows of the table at the end of an eStargz blob, whose footer says where it begins."""
    footer = blob[-51:]
    return _rows(zlib.decompressobj(31).decompress(blob[int(footer[16:32], 16) :]))


def _external(registry: FakeRegistry, reference: str) -> list[dict[str, Any]]:
    name, _, tag = reference.partition("/")[2].rpartition(":")
    found = registry.documents.get(f"/v2/{name}/manifests/{tag}-esgztoc")
    if found is None:
        return []
    (layer,) = json.loads(found[0])["layers"]
    return _rows(zlib.decompress(registry.blobs[layer["digest"]], 31))


def _rows(tar: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(_files(tar)["stargz.index.json"])["entries"]
    return rows


@dataclass
class Tenants:
    """A containerd's tenants, each in a namespace and with a plugin name."""

    containerd: Containerd
    seats: Mapping[str, tuple[str, str]]
    """Namespace and plugin name of each tenant."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def pull(self, tenant: str, reference: str) -> None:
        namespace, plugin = self.seats[tenant]
        local = ("--local",) if plugin == "overlayfs" else ()
        command = ("images", "pull", *local, "--plain-http", "--snapshotter", plugin, reference)
        done = self.containerd.ctr(*command, namespace=namespace, check=False)
        if done.returncode != 0:
            raise RefusedError(done.stderr)

    def read(self, tenant: str, reference: str, path: str) -> bytes:
        namespace, plugin = self.seats[tenant]
        name = f"c{next(self._numbers)}"
        command = ("run", "--rm", "--snapshotter", plugin, reference, name, "/bin/cat", path)
        done = self.containerd.ctr(*command, namespace=namespace, check=False)
        if done.returncode != 0:
            raise RefusedError(done.stderr)
        return done.stdout.encode()
