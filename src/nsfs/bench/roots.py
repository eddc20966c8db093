"""The ways in which an image becomes a root filesystem, and what each spends its time with until it is one.

Owns nothing: daemons and containerd are given. A root that was shown is taken away before another is asked for. Every
root can say which files its pages would be of, so that a cold start can be proven.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nsfs.bench.eager import Stack, copy_tree
from nsfs.bench.pages import regular_files
from nsfs.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nsfs.bench.eager import Containerd
    from nsfs.bench.node import Node

NAMESPACE = "default"


class Before(NamedTuple):
    """What comes before an image is shown, in seconds."""

    resolving: float = 0.0
    """To learn what it is."""
    indexing: float = 0.0
    """To get what must be there."""


class Root(Protocol):
    """One way."""

    def prepare(self) -> None:
        """Bring about what the way begins with."""

    def mount(self, target: str) -> Before:
        """Show the image at `target`, writable, as whoever wants it does: what that began with."""

    def umount(self, target: str) -> None:
        """Take it away; nothing happens if it is not there."""

    def stored(self) -> Iterable[str]:
        """The files that have its contents now."""


@dataclass(frozen=True, slots=True)
class LazyRoot:
    """nsfs's own, by a node that has what it has, or has no contents."""

    node: Node
    reference: str
    evicted: bool = False
    """Whether contents go before each start."""
    profile: str = "use"
    """What is done with what a start reads: record, use or off."""

    def prepare(self) -> None:
        """Let contents go."""
        if self.evicted:
            self.node.evict(self.reference, NAMESPACE)

    def mount(self, target: str) -> Before:
        """Show it by the driver that the node chooses: one call, as of `nsfs mount`."""
        phases = self.node.mount(self.reference, target, NAMESPACE, profile=self.profile)
        return Before(phases.resolve, phases.index)

    def umount(self, target: str) -> None:
        """Take it away."""
        with contextlib.suppress(NotFoundError):
            self.node.umount(target)

    def stored(self) -> Iterable[str]:
        """What domains' contents are read from."""
        return self.node.disks()


@dataclass(frozen=True, slots=True)
class PulledRoot:
    """containerd's: pulled and unpacked whole, by one that has nothing of the image."""

    containerd: Containerd
    reference: str

    def prepare(self) -> None:
        """Forget it."""
        self.containerd.clear()

    def mount(self, target: str) -> Before:
        """Pull and unpack, and show what was unpacked."""
        began = time.monotonic()
        self.containerd.pull(self.reference)
        pulled = time.monotonic()
        self.containerd.mount(self.reference, target)
        return Before(indexing=pulled - began)

    def umount(self, target: str) -> None:
        """Take it away."""
        self.containerd.umount(target)

    def stored(self) -> Iterable[str]:
        """Nothing: it is not there yet."""
        return ()


@dataclass(frozen=True, slots=True)
class CopiedRoot:
    """Where there is no containerd: an empty node of nsfs fetches the whole image, which is copied into a directory."""

    lazy: LazyRoot
    directory: str

    def prepare(self) -> None:
        """Forget the copy."""
        shutil.rmtree(self.directory, ignore_errors=True)
        os.makedirs(f"{self.directory}/mnt")

    def mount(self, target: str) -> Before:
        """Fetch everything, write it out as files, and show these."""
        began = time.monotonic()
        before = self.copy()
        copied = time.monotonic()
        self.stack().mount(target)
        return before._replace(indexing=copied - began - before.resolving)

    def copy(self) -> Before:
        """Fetch everything, and write it out as files."""
        target = f"{self.directory}/mnt"
        before = self.lazy.mount(target)
        try:
            copy_tree(target, f"{self.directory}/root")
        finally:
            self.lazy.umount(target)
        return before

    def umount(self, target: str) -> None:
        """Take it away."""
        self.stack().umount(target)

    def stored(self) -> Iterable[str]:
        """What the empty node has."""
        return self.lazy.stored()

    def stack(self) -> Stack:
        """What was copied, to be shown by overlayfs."""
        return Stack([f"{self.directory}/root"], self.directory)


@dataclass(frozen=True, slots=True)
class StackedRoot:
    """overlayfs over directories that are there."""

    stack: Stack

    def prepare(self) -> None:
        """Nothing."""

    def mount(self, target: str) -> Before:
        """Stack the directories: nobody is asked, and all is there."""
        self.stack.mount(target)
        return Before()

    def umount(self, target: str) -> None:
        """Take it away."""
        self.stack.umount(target)

    def stored(self) -> Iterable[str]:
        """The layers' files."""
        return (path for layer in self.stack.layers for path in regular_files(layer))
