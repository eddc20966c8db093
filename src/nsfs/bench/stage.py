"""What all samples of a bench share: the line, daemons of its own, containerd, a scratch directory.

Owns them: all of it is gone when the block of `open_stage` ends, whatever interrupted it, with every mount below the
scratch directory. One daemon has all of the image. Two more are there only where a way needs them: one has the image's
index alone, one also what its first start read, and so checkpoints that are laid out for that. A start by a node that
has never seen the image has a daemon of its own. Blocks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nsfs.bench.command import Command, run_command, with_config
from nsfs.bench.eager import Containerd, copy_layers, open_containerd
from nsfs.bench.line import FREE, Line, Shape, run_line
from nsfs.bench.model import WAYS, Way
from nsfs.bench.node import Node, run_node
from nsfs.bench.pages import drop_caches, forget_pages
from nsfs.bench.roots import NAMESPACE, CopiedRoot, LazyRoot, PulledRoot, StackedRoot
from nsfs.remote.hosts import is_loopback
from nsfs.remote.reference import Reference, parse_reference
from nsfs.serve.mounts import load_mounts, unmount

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from nsfs.bench.roots import Root
    from nsfs.model.report import ImageReport
    from nsfs.serve.config import Config

_LINGER = 1.0
"""Seconds for which a start is recorded after its first output: a server goes on to read until it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user asked for."""

    reference: str
    words: tuple[str, ...]
    """Of the command; empty for the image's own."""
    wait_for: str
    shape: Shape
    ways: Sequence[str] = WAYS
    samples: int
    seed: int | None
    directory: str
    """Scratch space, on the filesystem to compare."""
    output: str
    containerd: str
    """Socket; one that nobody answers at is none."""
    timeout: float
    """Seconds that a command may take to be up."""
    once: Collection[str] = frozenset()
    """Ways that one sample is enough of."""
    publish: bool = False
    """Whether an artifact is put beside the image first, for Way.PACK."""
    forget_all: bool = True
    """Whether all caches of the machine are dropped before each start, not just the image's pages."""


@dataclass(frozen=True, slots=True)
class Stage:
    """All of it."""

    wish: Wish
    config: Config
    line: Line
    image: ImageReport
    named: str
    """The image, by digest, over the line."""
    environment: Mapping[str, str]
    directory: str
    command: Command
    containerd: Containerd | None
    local: Node
    indexed: Node | None
    """Has the index."""
    profiled: Node | None
    """Has the index, and has seen a start."""
    stacks: list[StackedRoot] = field(default_factory=list)
    """The one that `overlay` shows, once it was made."""

    @property
    def target(self) -> str:
        """Where roots are shown."""
        return f"{self.directory}/mnt"

    def make_ready(self) -> None:
        """Have, over a free line, all of the image on one node, and whatever else the ways begin with."""
        self.line.shape = FREE
        if self.profiled is not None:
            # Before anything else, as a lull after the first pass has checkpoints made without a profile.
            self.profiled.index(self.named, NAMESPACE)
            self._record(LazyRoot(self.profiled, self.named, profile="record"))
        nodes = [node for node in (self.local, self.indexed) if node is not None]
        with ThreadPoolExecutor(len(nodes)) as pool:
            list(pool.map(lambda node: node.index(self.named, NAMESPACE), nodes))
        self.local.complete(self.named, NAMESPACE)
        if Way.OVERLAY in self.wish.ways:
            self.stacks.append(self._stack())
        if Way.LOCAL in self.wish.ways:
            self._record(LazyRoot(self.local, self.named, profile="record"))
        if self.profiled is not None and self.wish.publish:
            self.profiled.publish(self.named)

    def _record(self, root: LazyRoot) -> None:
        """Have a node know what a start reads, none of which is in memory."""
        root.prepare()
        self.forget(root)
        root.mount(self.target)
        try:
            run_command(self.target, self.command, timeout=self.wish.timeout, linger=_LINGER)
        finally:
            root.umount(self.target)

    def _evicted_root(self, node: Node | None, profile: str) -> LazyRoot:
        """By a node whose contents go first."""
        assert node is not None
        return LazyRoot(node, self.named, evicted=True, profile=profile)

    def forget(self, root: Root) -> None:
        """Have what a start reads not be in memory."""
        if self.wish.forget_all:
            drop_caches()
        else:
            forget_pages(root.stored())

    def _stack(self) -> StackedRoot:
        directory = f"{self.directory}/stack"
        if self.containerd is not None:
            return StackedRoot(copy_layers(self.containerd, self.named, directory))
        copied = CopiedRoot(LazyRoot(self.local, self.named), directory)
        copied.prepare()
        copied.copy()
        return StackedRoot(copied.stack())

    @contextlib.contextmanager
    def open_root(self, way: str) -> Iterator[Root]:
        """What the way begins with."""
        if way == Way.LOCAL:
            yield LazyRoot(self.local, self.named)
        elif way == Way.INDEXED:
            yield self._evicted_root(self.indexed, "off")
        elif way == Way.PROFILE:
            yield self._evicted_root(self.profiled, "use")
        elif way == Way.OVERLAY:
            yield self.stacks[0]
        elif way == Way.EAGER and self.containerd is not None:
            yield PulledRoot(self.containerd, self.named)
        else:
            with self._open_fresh("same-repository" if way == Way.PACK else "off") as fresh:
                yield CopiedRoot(fresh, f"{self.directory}/copy") if way == Way.EAGER else fresh

    @contextlib.contextmanager
    def _open_fresh(self, trust: str) -> Iterator[LazyRoot]:
        """By a node that has never seen anything, and believes such artifacts."""
        directory = f"{self.directory}/fresh"
        try:
            with run_node(directory, self.config, self.environment, trust=trust) as node:
                yield LazyRoot(node, self.named)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def open_stage(wish: Wish, config: Config, say: Callable[[str], None]) -> Iterator[Stage]:
    """Everything but what `make_ready` brings about; raises NsfsError where the image is not to be had."""
    parsed = parse_reference(wish.reference)
    assert isinstance(parsed, Reference)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_open_scratch(wish.directory))
        direct = is_loopback(parsed.registry)
        line = stack.enter_context(run_line(parsed.registry if direct else None))
        environment = {} if direct else _proxy(line)
        containerd = stack.enter_context(
            open_containerd(
                wish.containerd, plain_http=direct, hosts=config.registry.config_path, environment=environment
            )
        )
        local = stack.enter_context(run_node(f"{directory}/local", config, environment))
        indexed = profiled = None
        if Way.INDEXED in wish.ways:
            indexed = stack.enter_context(run_node(f"{directory}/indexed", config, environment))
        if wish.publish or Way.PROFILE in wish.ways:
            profiled = stack.enter_context(run_node(f"{directory}/profiled", config, environment))
        over = replace(parsed, registry=line.host) if direct else parsed
        say(f"asking for {wish.reference}")
        image = local.resolve(str(over), NAMESPACE)
        named = f"{over.registry}/{over.repository}@{image.digest}"
        command = with_config(wish.words, wish.wait_for, image.config)
        yield Stage(
            wish,
            config,
            line,
            image,
            named,
            environment,
            directory,
            command,
            containerd,
            local=local,
            indexed=indexed,
            profiled=profiled,
        )


@contextlib.contextmanager
def _open_scratch(parent: str) -> Iterator[str]:
    """A directory that is gone at the end, with whatever an interrupted start left mounted below it."""
    with tempfile.TemporaryDirectory(prefix="nsfs-bench-", dir=parent) as directory:
        os.makedirs(f"{directory}/mnt")
        try:
            yield directory
        finally:
            for mount in reversed(load_mounts()):
                if mount.target.startswith(f"{directory}/"):
                    unmount(mount.target, detach=True)


def _proxy(line: Line) -> dict[str, str]:
    """Have clients of TLS use the line, wherever they go."""
    proxy = f"http://{line.host}"
    return {"HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
