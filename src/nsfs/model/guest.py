"""Mounts of scope `guest`: what tells a virtual machine's runtime to pull an image inside of its guest. Pure.

The one mount has the form that Kata Containers reads as a virtual volume (its type `KataVirtualVolume`, and nydus-
snapshotter's snapshot/mount_option.go, which writes the same): type `fuse.nydus-overlayfs`, overlay's options over
nothing, and `io.katacontainers.volume=` with JSON in standard base64, of the volume type `image_guest_pull`. The
runtime takes the image's name from the container's annotations and hands `metadata` to its agent; nothing of it is
secret. A runtime that knows no such volumes fails to mount it: nothing else can come of it on this host.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Final

import msgspec

from nsfs.errors import DeniedError
from nsfs.model.snapshot import Kind, Mount, refuse_committed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsfs.model.snapshot import Record

_OPTION: Final = "io.katacontainers.volume="
_METADATA: Final = ("containerd.io/snapshot/cri.image-ref", "containerd.io/snapshot/cri.manifest-digest")


def plan_guest_mounts(kind: Kind, parents: Sequence[Record], *, upper: tuple[str, str], empty: str) -> list[Mount]:
    """The mounts of an active snapshot or a view over layers that nobody reads on this host; `upper` is (upper, work).

    Raises BusyError for a committed one, DeniedError where containerd unpacked a layer here.
    """
    refuse_committed(kind)
    writable = (f"workdir={upper[1]}", f"upperdir={upper[0]}") if kind is Kind.ACTIVE else ()
    options = (*writable, f"lowerdir={empty}", _OPTION + _render_volume(parents))
    return [Mount(type="fuse.nydus-overlayfs", source="overlay", options=options)]


def _render_volume(parents: Sequence[Record]) -> str:
    top = parents[0]
    if top.layer is None or any(parent.layer is None for parent in parents):
        raise DeniedError(
            "containerd unpacked a layer of this image on the host, where nothing of it may be",
            hint="delete the image there, and pull it so that containerd says which layers it means",
        )
    volume = {
        "volume_type": "image_guest_pull",
        "source": top.layer.reference,
        "image_pull": {"metadata": {name: top.labels[name] for name in _METADATA if name in top.labels}},
    }
    return b64encode(msgspec.json.encode(volume)).decode()
