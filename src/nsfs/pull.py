"""`nsfs pull`: composition root of what brings an image into containerd's own stores.

Runs in the command's process, with the registry settings of the daemon's configuration; the daemon itself is needed by
the snapshotter alone, if at all.
"""

from __future__ import annotations

import os
import platform
import signal
from typing import TYPE_CHECKING

import trio

from nsfs.core.pull import PullWish, pull
from nsfs.core.tasks import running
from nsfs.errors import UnsupportedError
from nsfs.model.oci import Platform
from nsfs.remote.credentials import DockerConfig, config_path
from nsfs.remote.reference import Reference, parse_reference
from nsfs.remote.source import open_source
from nsfs.remote.transport import Timeouts
from nsfs.serve.containerd import open_containerd

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsfs.model.pull import PullReport
    from nsfs.model.report import Progress
    from nsfs.serve.config import Config


def run(
    reference: str,
    config: Config,
    report: Callable[[Progress], None],
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
    try:
        return trio.run(_run, wish, image, config, report, socket)
    except _InterruptedError:
        raise KeyboardInterrupt from None


class _InterruptedError(Exception):
    """A signal asks us to end."""


async def _run(
    wish: PullWish, image: Reference, config: Config, report: Callable[[Progress], None], socket: str
) -> PullReport:
    async with running(_wait_for_signal):
        return await _pull(wish, image, config, report, socket)


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
