"""The ways in which an image becomes a root filesystem, each as the same four steps that a sample times.

Owns nothing: daemons and containerd are given. A root that was shown is taken away before another is asked for. Every
root can say which files its pages would be of, so that a cold start can be proven.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nsfs.bench.eager import Stack, copy_tree
from nsfs.bench.pages import regular_files
from nsfs.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nsfs.bench.eager import Containerd
    from nsfs.bench.node import Node

NAMESPACE = "default"


class Root(Protocol):
    """One way; times of `resolve`, `index` and `mount` are phases of a sample."""

    def prepare(self) -> None:
        """Bring about what the way begins with."""

    def resolve(self) -> None:
        """Learn what the image is."""

    def index(self) -> None:
        """Get what must be there before it can be shown."""

    def mount(self, target: str) -> None:
        """Show it at `target`, writable."""

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

    def resolve(self) -> None:
        """Ask the registry."""
        self.node.resolve(self.reference, NAMESPACE)

    def index(self) -> None:
        """Have layers indexed that are not."""
        self.node.index(self.reference, NAMESPACE)

    def mount(self, target: str) -> None:
        """Show it by the driver that the node chooses."""
        self.node.mount(self.reference, target, NAMESPACE, profile=self.profile)

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

    def resolve(self) -> None:
        """Nothing: it is part of the pull."""

    def index(self) -> None:
        """Pull and unpack."""
        self.containerd.pull(self.reference)

    def mount(self, target: str) -> None:
        """Show what was unpacked."""
        self.containerd.mount(self.reference, target)

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

    def resolve(self) -> None:
        """Ask the registry."""
        self.lazy.resolve()

    def index(self) -> None:
        """Fetch everything, and write it out as files."""
        target = f"{self.directory}/mnt"
        self.lazy.index()
        self.lazy.mount(target)
        try:
            copy_tree(target, f"{self.directory}/root")
        finally:
            self.lazy.umount(target)

    def mount(self, target: str) -> None:
        """Show the copy."""
        self.stack().mount(target)

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

    def resolve(self) -> None:
        """Nothing: nobody is asked."""

    def index(self) -> None:
        """Nothing: all is there."""

    def mount(self, target: str) -> None:
        """Stack the directories."""
        self.stack.mount(target)

    def umount(self, target: str) -> None:
        """Take it away."""
        self.stack.umount(target)

    def stored(self) -> Iterable[str]:
        """The layers' files."""
        return (path for layer in self.stack.layers for path in regular_files(layer))
