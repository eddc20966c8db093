"""containerd's part in the snapshots API: its names, its headers, and what it asks after ALREADY_EXISTS.

Owns a channel to a daemon and speaks as containerd's metadata store does (core/metadata/snapshot.go): names are
`<namespace>/<sequence>/<key>`, and what is offered is asked for by chain ID and parent.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING, Any, Self

import grpc

from nsfs.model.digest import chain_ids
from nsfs.serve import mounts
from nsfs.serve.proto import snapshots_pb2 as pb
from nsfs.serve.snapshots_rpc import SERVICE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from images import Image
    from nsfs.serve.proto import mount_pb2

REF = "containerd.io/snapshot.ref"


class Backend:
    """A plugin name at a daemon's socket. `namespace` is the header; None is containerd 1.6, or garbage collection."""

    _numbers = itertools.count(1)

    def __init__(self, socket: str, plugin: str = "nsfs", namespace: str | None = None) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self.plugin = plugin
        self._metadata = () if namespace is None else (("containerd-namespace", namespace),)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, method: str, request: Any, answer: Any, timeout: float = 30) -> Any:
        rpc = self.channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, answer.FromString)
        return rpc(request, timeout=timeout, metadata=self._metadata)

    def start_mounts(self, key: str) -> Any:
        """A call of Mounts that goes on; cancel it."""
        rpc = self.channel.unary_unary(
            f"/{SERVICE}/Mounts", pb.MountsRequest.SerializeToString, pb.MountsResponse.FromString
        )
        return rpc.future(pb.MountsRequest(snapshotter=self.plugin, key=key), metadata=self._metadata)

    def name(self, namespace: str, key: str) -> str:
        return f"{namespace}/{next(self._numbers)}/{key}"

    def prepare(self, key: str, parent: str = "", **more: Any) -> list[mount_pb2.Mount]:
        labels = more.get("labels", {})
        request = pb.PrepareSnapshotRequest(snapshotter=self.plugin, key=key, parent=parent, labels=labels)
        return list(self.call("Prepare", request, pb.PrepareSnapshotResponse).mounts)

    def view(self, key: str, parent: str = "", **more: Any) -> list[mount_pb2.Mount]:
        labels = more.get("labels", {})
        request = pb.ViewSnapshotRequest(snapshotter=self.plugin, key=key, parent=parent, labels=labels)
        return list(self.call("View", request, pb.ViewSnapshotResponse).mounts)

    def mounts(self, key: str) -> list[mount_pb2.Mount]:
        return list(self.call("Mounts", pb.MountsRequest(snapshotter=self.plugin, key=key), pb.MountsResponse).mounts)

    def commit(self, name: str, key: str) -> None:
        self.call(
            "Commit", pb.CommitSnapshotRequest(snapshotter=self.plugin, name=name, key=key), pb.StatSnapshotResponse
        )

    def remove(self, key: str) -> None:
        self.call("Remove", pb.RemoveSnapshotRequest(snapshotter=self.plugin, key=key), pb.StatSnapshotResponse)

    def stat(self, key: str) -> pb.Info:
        request = pb.StatSnapshotRequest(snapshotter=self.plugin, key=key)
        info: pb.Info = self.call("Stat", request, pb.StatSnapshotResponse).info
        return info

    def update(self, name: str, labels: Mapping[str, str]) -> None:
        request = pb.UpdateSnapshotRequest(snapshotter=self.plugin, info=pb.Info(name=name, labels=labels))
        self.call("Update", request, pb.UpdateSnapshotResponse)

    def usage(self, key: str) -> pb.UsageResponse:
        answer: pb.UsageResponse = self.call(
            "Usage", pb.UsageRequest(snapshotter=self.plugin, key=key), pb.UsageResponse
        )
        return answer

    def cleanup(self) -> None:
        self.call("Cleanup", pb.CleanupRequest(snapshotter=self.plugin), pb.StatSnapshotResponse)

    def batches(self, *filters: str) -> list[list[pb.Info]]:
        request = pb.ListSnapshotsRequest(snapshotter=self.plugin, filters=filters)
        rpc = self.channel.unary_stream(
            f"/{SERVICE}/List", pb.ListSnapshotsRequest.SerializeToString, pb.ListSnapshotsResponse.FromString
        )
        return [list(each.info) for each in rpc(request, timeout=30, metadata=self._metadata)]

    def select(self, *filters: str) -> list[pb.Info]:
        return [info for batch in self.batches(*filters) for info in batch]

    # What containerd does in a pull

    def offer(self, namespace: str, parent: str, labels: Mapping[str, str]) -> bool:
        """Prepare a layer that may be served on demand; whether it is."""
        key = self.name(namespace, f"extract-1-x {labels[REF]}")
        try:
            self.prepare(key, parent, labels=labels)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                return True
            raise
        return False

    def ask(self, target: str, parent: str) -> list[str]:
        """The List that follows."""
        return [info.name for info in self.select(f'labels."{REF}"=={target},parent=="{parent}"')]

    def pull(self, namespace: str, image: Image, reference: str) -> list[str]:
        """Every layer on demand; their names, lowest first."""
        names: list[str] = []
        for labels in offers(image, reference):
            parent = names[-1] if names else ""
            assert self.offer(namespace, parent, labels), labels
            names += self.ask(labels[REF], parent)
        assert len(names) == len(image.layers)
        return names


def offers(image: Image, reference: str) -> list[dict[str, str]]:
    """The labels with which containerd prepares each layer."""
    chains = chain_ids([layer.diff_id for layer in image.layers])  # type: ignore[misc]
    return [
        {
            REF: str(chain),
            "containerd.io/snapshot/cri.image-ref": reference,
            "containerd.io/snapshot/cri.manifest-digest": str(image.digest),
            "containerd.io/snapshot/cri.layer-digest": str(layer.digest),
            "containerd.io/snapshot/cri.image-layers": ",".join(str(each.digest) for each in image.layers[number:]),
        }
        for number, (layer, chain) in enumerate(zip(image.layers, chains, strict=True))
    ]


@contextlib.contextmanager
def mounted(given: Sequence[mount_pb2.Mount], target: Path) -> Iterator[Path]:
    """Mount what Prepare, View or Mounts gave, as containerd does: from the directory that all lowers are in."""
    (mount,) = given
    target.mkdir(exist_ok=True)
    flags, options, base = 0, [], "/"
    for option in mount.options:
        match option:
            case str(lowers) if lowers.startswith("lowerdir=") and ":" in lowers:
                paths = lowers.removeprefix("lowerdir=").split(":")
                base = os.path.commonpath(paths)
                options.append("lowerdir=" + ":".join(os.path.relpath(path, base) for path in paths))
            case "ro":
                flags |= 1
            case "rw":
                pass
            case "rbind":
                flags |= 4096 | 16384
            case _:
                options.append(option)
    with mounts._working_directory(base):
        mounts._mount(mount.source, str(target), mount.type, flags, ",".join(options) or None)
    try:
        yield target
    finally:
        mounts.unmount(str(target), detach=True)
