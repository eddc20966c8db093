"""`nsfs pull`: composition root of what brings an image into containerd's own stores.

Runs in the command's process, with the registry settings of the daemon's configuration. Where the snapshotter is ours,
its daemon is asked first to index the layers: containerd then waits for nothing, and whoever pulls sees how far it is.
"""

from __future__ import annotations

import os
import platform
import signal
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import trio

from nsfs.core.pull import PullWish, pull
from nsfs.core.tasks import running
from nsfs.errors import NsfsError, UnsupportedError
from nsfs.model.digest import Digest
from nsfs.model.oci import Platform
from nsfs.model.report import ImageReport, Note, Progress
from nsfs.remote.credentials import DockerConfig, config_path
from nsfs.remote.reference import Reference, parse_reference
from nsfs.remote.source import open_source
from nsfs.remote.transport import Timeouts
from nsfs.serve.api import ImageRequest
from nsfs.serve.client import open_control
from nsfs.serve.containerd import open_containerd

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsfs.model.pull import PullReport
    from nsfs.serve.api import Event
    from nsfs.serve.config import Config


def run(
    reference: str,
    config: Config,
    talk: Talk,
    *,
    socket: str,
    namespace: str,
    snapshotter: str,
    platform_name: str | None,
) -> PullReport:
    """Pull `reference` into a namespace of the containerd at `socket`; blocks; raises NsfsError, KeyboardInterrupt."""
    image = parse_reference(reference)
    if not isinstance(image, Reference):
        raise UnsupportedError(
            f"containerd's images come from registries: {reference}", hint="push the layout to one, or use nsfs mount"
        )
    wish = PullWish(
        name=str(image),
        registry=image.registry,
        repository=image.repository,
        identifier=image.identifier,
        platform=Platform.parse(platform_name) if platform_name else Platform(platform.machine(), "linux").normal(),
        namespace=namespace,
        snapshotter=snapshotter,
    )
    address = trio.run(_find_snapshotter, wish, socket)
    request = ImageRequest(reference=str(image), namespace=namespace, platform=platform_name, plugin=snapshotter)
    wish = replace(wish, lazy=_index(address, request, talk)) if address else wish
    try:
        return trio.run(_run, wish, image, config, talk, socket)
    except _InterruptedError:
        raise KeyboardInterrupt from None


class Talk(Protocol):
    """To whom we say what is going on."""

    def note(self, text: str) -> None:
        """Say one sentence."""

    def progress(self, report: Progress) -> None:
        """Say how far a piece of work is."""


async def _find_snapshotter(wish: PullWish, socket: str) -> str | None:
    async with open_containerd(socket, wish.namespace) as containerd:
        return await containerd.snapshotter_address(wish.snapshotter)


def _index(address: str, request: ImageRequest, talk: Talk) -> frozenset[Digest]:
    """Have the snapshotter behind `address` index the image, if it is an nsfs; gives the blobs that need no copy."""

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            talk.progress(event)
        elif isinstance(event, Note):
            talk.note(event.text)

    with ExitStack() as stack:
        try:
            control = stack.enter_context(open_control(address))
        except NsfsError:
            return frozenset()
        try:
            report = control.call("Index", request, ImageReport, listen)
        except NsfsError as error:
            talk.note(f"nsfs reads nothing of this image ahead: {error.message}")
            return frozenset()
    return frozenset(Digest(layer.digest) for layer in report.layers if layer.indexed)


class _InterruptedError(Exception):
    """A signal asks us to end."""


async def _run(wish: PullWish, image: Reference, config: Config, talk: Talk, socket: str) -> PullReport:
    async with running(_wait_for_signal):
        return await _pull(wish, image, config, talk.progress, socket)


async def _wait_for_signal() -> None:
    """Ctrl-C, SIGTERM and SIGHUP leave nothing behind: what must be said to containerd then is said."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            raise _InterruptedError


async def _pull(
    wish: PullWish, image: Reference, config: Config, report: Callable[[Progress], None], socket: str
) -> PullReport:
    registry = config.registry
    async with (
        open_containerd(socket, wish.namespace) as containerd,
        open_source(
            image,
            credentials=DockerConfig(registry.docker_config or config_path(os.environ)),
            hosts=registry.config_path,
            timeouts=Timeouts(registry.connect_timeout, registry.read_timeout),
        ) as source,
    ):
        return await pull(wish, source, containerd, report)
