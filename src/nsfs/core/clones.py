"""Clones: lowers and unpacked layers shown a second time, with shifted owners, for containers in user namespaces.

Owns which directory is shown under which short name by which shift, and which snapshots stack it: once for all of them,
gone with the last. A clone shares the pages of what it shows. An overlay keeps its own hold of what it stacks, so a
daemon leaves clones to be swept away by the next one, which makes its own when it is asked again. Refuses everything
where this host cannot shift owners.

Concurrency: one lock around all changes; nothing here waits for a worker or a registry. Who clones a view holds the
lock of its domain's lowers, too, and releases the clone before the view.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, TypeVar

import trio

from nsfs.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from nsfs.model.shift import Shift

    Clone: TypeAlias = tuple[Hashable, Shift]

S = TypeVar("S", bound="Hashable")

_UNDO_DEADLINE: Final = 90.0
"""Seconds to unmount: longer than the kernel's adapter takes by itself."""


class Kernel(Protocol):
    """What mounts; see core.manual.Kernel. Raises NsfsError."""

    async def mount_clones(self, clones: Sequence[tuple[str, str]], shift: Shift) -> None:
        """Show each directory at a second path, read-only, with shifted owners: all of them or none."""

    async def unmount(self, paths: Sequence[str], *, force: bool) -> None:
        """Take mounts away."""

    def lower_path(self, name: str) -> str:
        """Where what is stacked under that short name is mounted."""


class Clones:
    """The service."""

    def __init__(self, kernel: Kernel, *, possible: bool) -> None:
        self._kernel = kernel
        self._possible = possible
        self._names: dict[Clone, str] = {}
        self._users: defaultdict[Clone, set[int]] = defaultdict(set)
        self._lock = trio.Lock()

    async def acquire(self, sources: Mapping[S, str], shift: Shift, snapshot: int) -> dict[S, str]:
        """Where each of `sources`, directories by what they are, shows with shifted owners.

        They stay until `snapshot` releases them. What a source is never changes its meaning, as a path may.
        """
        self._refuse_impossible()
        async with self._lock:
            fresh = [source for source in sources if (source, shift) not in self._names]
            names = dict(zip(fresh, self._free_names(), strict=False))
            if fresh:
                pairs = [(sources[source], self._kernel.lower_path(name)) for source, name in names.items()]
                await self._kernel.mount_clones(pairs, shift)
            # CHECKPOINT-FREE: what is mounted is known, also where the caller is cancelled next.
            self._names |= {(source, shift): name for source, name in names.items()}
            for source in sources:
                self._users[source, shift].add(snapshot)
            return {source: self._path((source, shift)) for source in sources}

    async def release(self, snapshot: int) -> None:
        """Unmount what nobody but `snapshot` stacks; once begun this is finished, since nobody would know of it."""
        async with self._lock:
            idle = [clone for clone, users in self._users.items() if users == {snapshot}]
            for users in self._users.values():
                users.discard(snapshot)
            paths = [self._path(clone) for clone in idle]
            for clone in idle:
                del self._names[clone], self._users[clone]
            if paths:
                with trio.move_on_after(_UNDO_DEADLINE, shield=True):
                    await self._kernel.unmount(paths, force=True)

    def stacked(self) -> set[int]:
        """The snapshots that stack any."""
        return {snapshot for users in self._users.values() for snapshot in users}

    def _refuse_impossible(self) -> None:
        if not self._possible:
            raise UnsupportedError(
                "owners cannot be shifted: this kernel cannot, or kernel.idmap or kernel.erofs is false",
                hint="see nsfs doctor; without remap-ids among the plugin's capabilities containerd makes a copy",
            )

    def _path(self, clone: Clone) -> str:
        return self._kernel.lower_path(self._names[clone])

    def _free_names(self) -> itertools.filterfalse[str]:
        taken = set(self._names.values())
        return itertools.filterfalse(taken.__contains__, (f"i{number:x}" for number in itertools.count()))
