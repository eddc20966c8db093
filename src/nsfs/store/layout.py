"""Every path that nsfs has on disk.

Owns names, not contents: nothing here opens or makes a file. A domain's name becomes one path component by percent
escapes, so that two names never share a directory and none leads out of it; digests are checked before they get here.
All paths are absolute if the two roots are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from nsfs.errors import UsageError
from nsfs.store.index import check_key

if TYPE_CHECKING:
    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey
    from nsfs.store.crypt import DomainKey

_NAME_MAX = 255


def escape_component(name: str) -> str:
    """`name` as one path component, injectively; raises UsageError for what cannot be one.

    Everything but the unreserved characters of RFC 3986 (section 2.3) is escaped.
    """
    try:
        escaped = quote(name, safe="")
    except UnicodeEncodeError as error:
        raise UsageError(f"not a name: {name!r}") from error
    if escaped in {"", ".", ".."} or len(escaped) > _NAME_MAX:
        raise UsageError(f"not a name: {name[:200]!r}")
    return escaped


class DomainLayout:
    """The paths of one domain that survive a reboot, and the key that their files are under."""

    def __init__(self, path: str, key: DomainKey | None = None) -> None:
        self.path = path
        self.key = key
        """None: they are plain."""

    @property
    def disk(self) -> str:
        """The pool's bytes; sparse, address = offset."""
        return os.path.join(self.path, "disk")

    @property
    def present(self) -> str:
        """The durable bitmap: which blocks of the disk are there."""
        return os.path.join(self.path, "present")

    @property
    def index(self) -> str:
        """LMDB: contents, addresses, layers."""
        return os.path.join(self.path, "index.lmdb")

    @property
    def lock(self) -> str:
        """Held by the processes that write here."""
        return os.path.join(self.path, "lock")

    @property
    def tag(self) -> str:
        """Tells backup programs that all of this can be had again (bford.info/cachedir)."""
        return os.path.join(self.path, "CACHEDIR.TAG")

    @property
    def layers(self) -> str:
        """Holds a directory for every blob."""
        return os.path.join(self.path, "layers")

    def blob_dir(self, key: LayerKey) -> str:
        """What belongs to a layer's blob, whatever index it is read by."""
        name = f"{key.blob.hex}@{key.origin}" if check_key(key).origin else key.blob.hex
        return os.path.join(self.layers, self._name(name))

    def layer_dir(self, key: LayerKey) -> str:
        """A layer's index, tables and maps."""
        return os.path.join(self.blob_dir(key), self._name(key.index))

    def spool(self, key: LayerKey) -> str:
        """The compressed bytes of a layer's blob while they are still needed."""
        return os.path.join(self.blob_dir(key), "blob.partial")

    def map(self, key: LayerKey, map_id: str = "") -> str:
        """A layer's EROFS image; `map_id` where it depends on the layers below."""
        name = f"map-{self._name(escape_component(map_id))}.erofs" if map_id else "map.erofs"
        return os.path.join(self.layer_dir(key), name)

    @property
    def profiles(self) -> str:
        """Holds a file for every profile."""
        return os.path.join(self.path, "profiles")

    def profile(self, image: Digest, owner: str) -> str:
        """What a start of an image reads, as `owner` recorded it ("" in a domain that is one owner's)."""
        return os.path.join(self.profiles, self._name(escape_component(f"{image.hex}@{owner}" if owner else image.hex)))

    def _name(self, text: str) -> str:
        """A digest tells which image it is of: where the domain has a key, names are made with it."""
        return self.key.name(text) if self.key else text


class RunLayout:
    """The paths of one domain that a reboot takes away."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def fuse(self) -> str:
        """Where the domain's FUSE filesystem is mounted."""
        return os.path.join(self.path, "fuse")

    @property
    def socket(self) -> str:
        """Where the domain's worker listens for its fronts."""
        return os.path.join(self.path, "worker.sock")

    @property
    def kept(self) -> str:
        """What the next daemon has to know of the domain, beside its descriptors."""
        return os.path.join(self.path, "kept")

    @property
    def etc(self) -> str:
        """What the domain's worker sees as /etc, where that is its own."""
        return os.path.join(self.path, "etc")

    def fuse_disk(self, map_id: str) -> str:
        """The disk as the view of one map sees it; an EROFS mount's `device=`."""
        return os.path.join(self.fuse, "disks", escape_component(map_id))

    def fuse_map(self, map_id: str) -> str:
        """An EROFS image, as a mount's source."""
        return os.path.join(self.fuse, "maps", escape_component(map_id))

    def fuse_layer(self, map_id: str) -> str:
        """The layer of one map as a tree, where the kernel has no EROFS."""
        return os.path.join(self.fuse, "layers", escape_component(map_id))

    def fuse_tree(self, tree_id: str) -> str:
        """A stack of layers as one tree."""
        return os.path.join(self.fuse, "trees", escape_component(tree_id))


class Layout:
    """The paths of one daemon: `root` survives a reboot, `run` does not."""

    def __init__(self, root: str, run: str) -> None:
        self.root = root
        self.run = run

    @property
    def meta(self) -> str:
        """LMDB of the daemon: its mounts."""
        return os.path.join(self.root, "meta.lmdb")

    @property
    def domains(self) -> str:
        """Holds a directory for every domain."""
        return os.path.join(self.root, "domains")

    @property
    def keys(self) -> str:
        """Holds a file for every domain that has a key."""
        return os.path.join(self.root, "keys")

    def key(self, domain: str) -> str:
        """The key of a domain; raises UsageError for a name that cannot be one."""
        return os.path.join(self.keys, escape_component(domain))

    def domain(self, name: str, key: DomainKey | None = None) -> DomainLayout:
        """The durable paths of a domain; raises UsageError for a name that cannot be one."""
        return DomainLayout(os.path.join(self.domains, escape_component(name)), key)

    def domain_run(self, name: str) -> RunLayout:
        """The other paths of a domain; raises UsageError as `domain` does."""
        return RunLayout(os.path.join(self.domain_runs, escape_component(name)))

    def parse_fuse_view(self, path: str) -> tuple[str, str] | None:
        """Domain and view of what `fuse_map` or `fuse_layer` of `RunLayout` gave; None if it is none of those."""
        parts = path.removeprefix(self.domain_runs + "/").split("/")
        if len(parts) != 4 or parts[1] != "fuse" or parts[2] not in {"maps", "layers"}:
            return None
        return unquote(parts[0]), unquote(parts[3])

    @property
    def socket(self) -> str:
        """The daemon's control socket."""
        return os.path.join(self.run, "nsfs.sock")

    @property
    def holder(self) -> str:
        """Where the process listens that keeps descriptors for the next daemon."""
        return os.path.join(self.run, "holder.sock")

    @property
    def domain_runs(self) -> str:
        """Holds what a reboot takes away of every domain."""
        return os.path.join(self.run, "domains")

    @property
    def lock(self) -> str:
        """Held by the daemon that lives, so that two never share a root."""
        return os.path.join(self.root, "lock")

    @property
    def logins(self) -> str:
        """Holds a directory for every owner of whom `nsfs login` keeps anything."""
        return os.path.join(self.root, "credentials")

    def credentials(self, owner: str) -> str:
        """What `nsfs login` keeps for an owner."""
        return os.path.join(self.logins, escape_component(owner), "config.json")

    @property
    def snapshots(self) -> str:
        """Holds a directory for every snapshot that somebody may write to, or has."""
        return os.path.join(self.root, "snapshots")

    @property
    def lowers(self) -> str:
        """Holds every mounted view under a short name, so that 128 of them fit into a page of overlay's options."""
        return os.path.join(self.run, "l")

    @property
    def starting(self) -> str:
        """Names of the views, as block device infos, that read less ahead than others for as long as a start takes."""
        return os.path.join(self.run, "starting")

    @property
    def etc(self) -> str:
        """What workers see as /etc."""
        return os.path.join(self.run, "etc")

    @property
    def stage(self) -> str:
        """An empty directory, on which each worker puts its own root together."""
        return os.path.join(self.run, "stage")

    def upper(self, mount_id: str) -> str:
        """What was written to a writable mount."""
        return os.path.join(self.root, "uppers", escape_component(mount_id), "fs")

    def work(self, mount_id: str) -> str:
        """Overlay's own directory beside `upper`."""
        return os.path.join(self.root, "uppers", escape_component(mount_id), "work")
