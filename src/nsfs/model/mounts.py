"""From the views of an image to the mounts that make its root filesystem. Pure.

A *lower* is one view (or the FUSE tree of the whole chain), mounted once under a short name of at most eight characters
in one flat directory, so that 128 of them fit into one page of overlay's mount options.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec import Struct

from nsfs.errors import DeniedError, UsageError
from nsfs.model.policy import view_name

if TYPE_CHECKING:
    from collections.abc import Sequence

OVERLAY_OPTIONS: Final = ("xino=on", "redirect_dir=nofollow", "metacopy=off", "index=off")
"""Always the same, whatever the host's defaults: containerd's diff understands neither redirects nor metacopies."""


class Driver(enum.StrEnum):
    """How the kernel sees a layer."""

    EROFS = "erofs"
    EROFS_LOOP = "erofs-loop"
    FUSE = "fuse"


@dataclass(frozen=True, slots=True)
class Host:
    """What decides about drivers: who runs the daemon, and what its kernel and configuration allow."""

    root: bool
    erofs: bool
    file_backed: bool
    idmap: bool = False
    """Owners can be shifted."""
    directio: bool = True
    """EROFS, or the loop device below it, reads past the page cache of its files."""


def choose_driver(wish: str, host: Host) -> Driver:
    """The driver for a mount whose user asked for `wish`, "auto" or a Driver; raises where it cannot be, and why."""
    if wish == "auto":
        if not host.root or not host.erofs:
            return Driver.FUSE
        return Driver.EROFS if host.file_backed else Driver.EROFS_LOOP
    try:
        driver = Driver(wish)
    except ValueError:
        raise UsageError(f"not a driver: {wish[:100]!r}", hint="auto, erofs, erofs-loop or fuse") from None
    if driver is not Driver.FUSE and not host.root:
        raise DeniedError(f"the {driver} driver needs root", hint="only root may mount erofs; use --driver fuse")
    if driver is not Driver.FUSE and not host.erofs:
        raise UsageError("this kernel or configuration mounts no erofs", hint="use --driver fuse; see nsfs doctor")
    if driver is Driver.EROFS and not host.file_backed:
        raise UsageError(
            "this kernel or configuration does not mount erofs from files",
            hint="use --driver erofs-loop; see nsfs doctor",
        )
    return driver


class Lower(Struct, frozen=True, array_like=True):
    """One view to be mounted once for all who stack it."""

    domain: str
    view: str
    driver: Driver


def unique_maps(maps: Sequence[str]) -> list[str]:
    """`maps`, top first, each once at its topmost place.

    Overlay refuses a directory that comes twice (ELOOP), and the upper of two equal ones hides the lower whole.
    """
    return list(dict.fromkeys(maps))


@dataclass(frozen=True, slots=True)
class Bind:
    """Show the one lower as it is."""

    source: str


@dataclass(frozen=True, slots=True)
class Overlay:
    """Stack `lowers`, top first; read-only without `upper`."""

    lowers: tuple[str, ...]
    upper: str | None = None
    work: str | None = None


class Rootfs(NamedTuple):
    """A tree, and where it is to be."""

    target: str
    plan: Bind | Overlay


def plan_rootfs(lowers: Sequence[str], *, marks: bool, empty: str, upper: tuple[str, str] | None) -> Bind | Overlay:
    """How `lowers` (top first) become one tree.

    `marks` says whether a single lower has whiteouts or opaque marks, which only an overlay hides; `empty` is an empty
    directory to put below it; `upper` is (upper, work) of a writable mount.
    """
    if upper is not None:
        return Overlay(tuple(lowers) or (empty,), *upper)
    if not lowers:
        return Bind(empty)
    if len(lowers) == 1 and not marks:
        return Bind(lowers[0])
    return Overlay(tuple(lowers) if len(lowers) > 1 else (*lowers, empty))


class MountRecord(Struct, frozen=True, kw_only=True):
    """One manual mount: what was asked for and what was built for it."""

    id: str
    target: str
    reference: str
    digest: str
    namespace: str
    domain: str
    transient: bool
    driver: str
    writable: bool
    files: int
    size: int
    maps: list[str]
    """Map IDs, top first."""
    suffix: str
    """Of the views' names: how long a read may wait (`model.policy.Patience`)."""
    readers: dict[str, str] = {}
    """Of maps that are read as somebody, where several share a domain: as whom."""
    recording: str = ""
    """Which recording notes what is read of it first (`model.policy.ViewName`)."""

    def views(self) -> list[str]:
        """The names of its maps' views."""
        readers = [self.readers.get(map_id, "") for map_id in self.maps]
        pairs = zip(self.maps, readers, strict=True)
        return [view_name(map_id, self.suffix, reader, self.recording) for map_id, reader in pairs]

    def describe(self) -> dict[str, str | int | bool]:
        """What a mount's own `.nsfs/mount.json` says of it, beside its usage."""
        fields = ("id", "target", "reference", "digest", "namespace", "domain", "driver", "writable", "files", "size")
        return {name: getattr(self, name) for name in fields}
