"""The worker of one domain: composition root of everything that serves a tenant's reads.

Started by the daemon's fork server with the socket to the daemon, the live bitmap, the domain's key and, for root, the
FUSE connection. It ends when its FUSE filesystem is unmounted, and, where it has no line to a next daemon, with its
daemon; dying at any other time loses nothing but time.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import trio

from nsfs.core import worker_api
from nsfs.core.blobs import Blobs
from nsfs.core.claimed import ClaimedLayers
from nsfs.core.completing import Completing
from nsfs.core.domain import Domain, Health
from nsfs.core.domain_cache import DomainCache, NotedUse, Uses
from nsfs.core.dropping import drop_often
from nsfs.core.exports import Exports
from nsfs.core.fetcher import open_fetcher
from nsfs.core.fetchview import FetchConfig
from nsfs.core.grants import Shares
from nsfs.core.images import Images, Located
from nsfs.core.jobs import Jobs
from nsfs.core.keeping import KeptPool
from nsfs.core.layers import Layers
from nsfs.core.libraries import Libraries
from nsfs.core.looking import Looking
from nsfs.core.lulls import Lulls
from nsfs.core.maps import Maps
from nsfs.core.pinned import Pinned
from nsfs.core.prefetch import Prefetches
from nsfs.core.proving import Proofs
from nsfs.core.recording import Recordings
from nsfs.core.spanning import Spanning
from nsfs.core.starts import Starts, usage_of
from nsfs.core.startup import Startups
from nsfs.core.tasks import open_tasks
from nsfs.core.union import UnionTree
from nsfs.core.vfs import DomainFs
from nsfs.core.views import Views
from nsfs.errors import NotFoundError, NsfsError
from nsfs.model.oci import Platform
from nsfs.model.policy import parse_view_name
from nsfs.remote.client import range_connections
from nsfs.remote.reference import LayoutReference, parse_reference
from nsfs.remote.source import open_remote
from nsfs.remote.transport import Timeouts
from nsfs.serve.config import unpack_config
from nsfs.serve.credentials import AskedCredentials
from nsfs.serve.forkclient import received_fds
from nsfs.serve.fuse import FuseOperations
from nsfs.serve.joblending import LentServer, limit_memory
from nsfs.serve.lending import Borrowing, Uplink
from nsfs.serve.logs import counted_bugs, start_logging
from nsfs.serve.relay import OwnReach, SharedReach
from nsfs.serve.session import Session, widen_descriptors
from nsfs.serve.wire import PassingStream, open_peer
from nsfs.serve.worker_args import Ready, WorkerArgs
from nsfs.store.crypt import SALT_SIZE, DomainKey, load_key
from nsfs.store.index import open_index
from nsfs.store.layers import LayerTable, open_table
from nsfs.store.layout import Layout
from nsfs.store.pool import open_pool
from nsfs.store.profiles import Profiles
from nsfs.store.recovery import recover
from nsfs.store.resident import Resident
from nsfs.store.sealed import SealedRecords, load_content
from nsfs.store.spool import Spool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nsfs.core.ports import Source
    from nsfs.model.pool import LayerKey
    from nsfs.remote.source import Remote
    from nsfs.serve.config import Config
    from nsfs.serve.relay import Reach
    from nsfs.serve.wire import Methods
    from nsfs.store.index import DomainIndex
    from nsfs.store.layout import DomainLayout
    from nsfs.store.pool import Pool

log = logging.getLogger(__name__)

_FLUSH_EVERY: Final = 5.0
"""Seconds between making what was written durable."""
_decode_args = msgspec.msgpack.Decoder(WorkerArgs).decode


def warm_up() -> None:
    """Do, for all workers that are forked from this process, what takes long when it is done first.

    OpenSSL looks an algorithm up at its first use: of a worker's start, a tenth.
    """
    key, salt = DomainKey.generate(), os.urandom(SALT_SIZE)
    SealedRecords(key, salt).seal(b"", b"")
    key.disk(salt)


def main(args: bytes, fds: list[int]) -> int:
    """Entry point for the fork server."""
    params = _decode_args(args)
    config = unpack_config(params.config)
    start_logging(config.log_format, config.log_level)
    limit_memory(params.memory)
    widen_descriptors()
    trio.run(_run, params, config, fds)
    return 0


async def _run(params: WorkerArgs, config: Config, fds: list[int]) -> None:
    control = PassingStream(socket.socket(fileno=fds[0]))
    layout = Layout(config.root, config.run).domain(params.domain, load_key(fds[2]))
    async with AsyncExitStack() as stack:
        index = stack.enter_context(open_index(layout.index, layout.key))
        pool = open_pool(layout, fds[1], index.salt)
        stack.callback(pool.close)
        unfinished = [] if params.is_trial else await trio.to_thread.run_sync(_recover, layout, index, pool)
        uplink = Uplink()
        borrowing = Borrowing(uplink)
        remote = await stack.enter_async_context(
            open_remote(
                credentials=AskedCredentials(uplink),
                hosts=borrowing,
                layouts=borrowing.layout,
                timeouts=Timeouts(config.registry.connect_timeout, config.registry.read_timeout),
                connections=config.registry.connections,
            )
        )
        nursery = await stack.enter_async_context(open_tasks())
        reach: Reach = OwnReach(RemoteSources(remote), nursery, remote.take_bill)
        if params.is_shared:
            reach = SharedReach(reach.sources, borrowing, uplink, nursery, config.grant_ttl)
        forks = LentServer(uplink, nursery)
        contents = await _open_contents(stack, layout, config, pool, index, fds[1:3], forks, reach)
        worker = _compose(stack, layout, config, index, forks, reach, contents)
        worker.spanning.begin(unfinished)
        worker.shown.show_again(params.views, params.trees)
        worker.cache.resume()
        await _serve(params, config, fds, control, pool, worker, uplink)


class _Worker:
    """What `_compose` made."""

    def __init__(
        self,
        domain: Domain,
        methods: Methods,
        cache: DomainCache,
        spanning: Spanning,
        shown: ShownTree,
        kept: KeptPool,
    ) -> None:
        self.domain = domain
        self.methods = methods
        self.cache = cache
        self.spanning = spanning
        self.shown = shown
        self.kept = kept


class _Contents(NamedTuple):
    """Layers and what is in them: the services that everything else is made of."""

    nursery: trio.Nursery
    kept: KeptPool
    blobs: Blobs
    startups: Startups
    claimed: ClaimedLayers
    profiles: Profiles
    recordings: Recordings
    spanning: Spanning
    layers: Layers
    views: Views


async def _open_contents(
    stack: AsyncExitStack,
    layout: DomainLayout,
    config: Config,
    pool: Pool,
    index: DomainIndex,
    shared: Sequence[int],
    forks: LentServer,
    reach: Reach,
) -> _Contents:
    nursery = await stack.enter_async_context(trio.open_nursery())
    stack.callback(nursery.cancel_scope.cancel)
    kept = KeptPool(pool)
    fetcher = await stack.enter_async_context(open_fetcher(kept, fetch_config(config)))
    blobs = Blobs(reach.sources, index)
    cores = os.cpu_count() or 1
    jobs = Jobs(forks, limit=max(2, cores), fed_limit=max(4, 2 * cores), shared=shared)
    files = LayerFiles(layout)

    def written(ranges: Sequence[tuple[int, int]]) -> None:
        for address, size in ranges:
            pool.mark_dirty(address, size)

    startups = Startups(files.table, kept, blobs, nursery, lambda key: index.layer(key) is not None)
    claimed = ClaimedLayers(layout.path, blobs, jobs, startups)
    profiles = Profiles(layout)
    recordings = Recordings(index, files.table, profiles, nursery)
    lulls = Lulls(fetcher.idle_for, recordings.are_running)
    spanning = Spanning(index, files, blobs, jobs, nursery, claimed=claimed, lulls=lulls)
    layers = Layers(index, files, blobs, jobs, nursery, written=written, claimed=claimed, spans=spanning)
    views = Views(index, files.table, blobs, spanning, pool, fetcher, recordings, startups)
    return _Contents(nursery, kept, blobs, startups, claimed, profiles, recordings, spanning, layers, views)


def _compose(
    stack: AsyncExitStack,
    layout: DomainLayout,
    config: Config,
    index: DomainIndex,
    forks: LentServer,
    reach: Reach,
    contents: _Contents,
) -> _Worker:
    nursery, kept, blobs, startups, claimed, profiles, recordings, spanning, layers, views = contents
    maps = Maps(partial(load_content, key=layout.key))
    images = Images(reach.sources, index, host_platform(), reach.gate(index, blobs))
    looking = Looking(layers, maps, views.look)
    prefetches = Prefetches(index, views, nursery)
    libraries = Libraries(maps, views, nursery)
    starts = Starts(profiles, recordings, prefetches, startups, libraries)
    shown = ShownTree(index, maps, views, starts, libraries, Resident([layout.index]))
    stack.callback(shown.resident.close)
    proofs = Proofs(index, layers, claimed, views, startups)
    completing = Completing(index, proofs, nursery, follows_use=config.fetch.complete)
    uses = Uses(index, shown, completing, prefetches, nursery)
    cache = DomainCache(index, images, layers, spanning, views, looking, uses, completing)
    bugs = stack.enter_context(counted_bugs())
    noted = NotedUse(shown, uses.note)
    domain = Domain(images, layers, blobs, views, looking, noted, lambda: Health(bugs.count, kept.trouble), starts)
    pinned = Pinned(images, layers, maps, index, views, starts)
    exports = Exports(images, layers, spanning, looking, profiles, views)
    services = domain, pinned, cache, exports, Shares(index, views), kept
    parts = (*(service.methods() for service in services), reach.methods(blobs), forks.methods())
    methods = {name: method for part in parts for name, method in part.items()}
    return _Worker(domain, methods, cache, spanning, shown, kept)


def _recover(layout: DomainLayout, index: DomainIndex, pool: Pool) -> list[LayerKey]:
    """Clear up behind a predecessor; a domain that cannot be cleared can be read all the same."""
    try:
        return recover(layout, index, pool)
    except NsfsError as error:
        log.warning("what an earlier worker left is not cleared: %s", error)
        return []


async def _serve(
    params: WorkerArgs,
    config: Config,
    fds: list[int],
    control: PassingStream,
    pool: Pool,
    worker: _Worker,
    uplink: Uplink,
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_flush_often, worker.kept)
        nursery.start_soon(_keep_in_memory, worker.shown.resident)
        nursery.start_soon(drop_often, pool)
        if params.fuse:
            ready = trio.Event()
            session = Session(FuseOperations(worker.shown.files), fds[3], clone=fds[4] if params.clone else None)
            nursery.start_soon(_serve_fuse, session, params.init, ready, nursery.cancel_scope)
            await ready.wait()
        else:
            run = Layout(config.root, config.run).domain_run(params.domain)
            await nursery.start(_serve_fronts, run.socket, worker.domain)
        sockets = _sockets(control, fds[-1] if params.line else None)
        await _serve_daemons(params, sockets, worker.methods, uplink)
        nursery.cancel_scope.cancel()
    _flush(worker.kept)


async def _serve_daemons(
    params: WorkerArgs, sockets: AsyncIterator[PassingStream], methods: Methods, uplink: Uplink
) -> None:
    """Answer our daemon, and then those that follow it; return when no other can come."""
    async for stream in sockets:
        try:
            async with open_peer(stream, methods, name=params.domain) as peer:
                uplink.connect(peer)
                await peer.call("Ready", Ready(build=params.build), worker_api.Empty)
                await peer.wait_closed()
        except NsfsError as error:
            log.info("a daemon did not stay: %s", error)
        uplink.disconnect()
        log.info("the daemon is gone")


async def _sockets(control: PassingStream, line: int | None) -> AsyncIterator[PassingStream]:
    """The one that we were started with; and where there is a line, all that come over it."""
    yield control
    while line is not None and (stream := await _next_socket(line)) is not None:
        yield stream


async def _next_socket(line: int) -> PassingStream | None:
    """What a new daemon sends, or None for an end; where nobody can send any more, reads go on without one."""
    with trio.socket.fromfd(line, socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        data, ancillary, _, _ = await sock.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if not data:
        log.warning("no daemon will come any more")
        await trio.sleep_forever()
    fds = received_fds(ancillary)
    if not fds:
        return None
    (fd,) = fds
    return PassingStream(socket.socket(fileno=fd))


async def _serve_fuse(session: Session, init: bytes, ready: trio.Event, scope: trio.CancelScope) -> None:
    await session.serve(init, on_ready=ready.set)
    log.info("the domain was unmounted")
    scope.cancel()


async def _serve_fronts(path: str, domain: Domain, task_status: trio.TaskStatus[None]) -> None:
    """Answer the fronts of a user's mounts at the socket `path`."""
    methods = domain.front_methods()

    async def serve_front(stream: trio.SocketStream) -> None:
        try:
            async with open_peer(stream, methods, name="worker") as peer:
                await peer.wait_closed()
        except NsfsError as error:
            log.info("a front is not understood: %s", error)

    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(path)
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen()
    task_status.started()
    await trio.serve_listeners(serve_front, [trio.SocketListener(listener)])


async def _flush_often(pool: KeptPool) -> None:
    while True:
        await trio.sleep(_FLUSH_EVERY)
        await trio.to_thread.run_sync(_flush, pool)


async def _keep_in_memory(resident: Resident) -> None:
    """What we map may grow: jobs write there, too."""
    while True:
        await trio.to_thread.run_sync(resident.follow)
        await trio.sleep(_FLUSH_EVERY)


def _flush(pool: KeptPool) -> None:
    """Make durable what was written; what cannot be is absent again, and fetched when it is wanted."""
    try:
        pool.flush()
    except NsfsError as error:
        log.warning("the pool could not be made durable: %s", error)


class RemoteSources:
    """`core.images.Sources` over the registries and layouts of `remote`."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._sources: dict[str, Source] = {}

    async def locate(self, reference: str, owner: str) -> Located:
        """See Sources."""
        parsed = parse_reference(reference)
        if isinstance(parsed, LayoutReference):
            repository, version = f"oci:{parsed.directory}", parsed.identifier or ""
        else:
            repository, version = f"{parsed.registry}/{parsed.repository}", parsed.identifier
        return Located(str(parsed), repository, parsed.tag or "", version, await self.open(repository, owner))

    async def open(self, repository: str, owner: str) -> Source:
        """See Sources; whoever asks, it is with the one owner's credentials."""
        del owner
        if repository not in self._sources:
            self._sources.setdefault(repository, await self._remote.source(parse_reference(repository)))
        return self._sources[repository]


class LayerFiles:
    """`core.layers.Files` of a domain, and the tables among them."""

    def __init__(self, layout: DomainLayout) -> None:
        self._layout = layout
        self.path = layout.path
        self.map = layout.map

    def spool(self, key: LayerKey) -> Spool:
        """See Files."""
        return Spool(self._layout.spool(key), self._layout.key)

    def table(self, key: LayerKey) -> LayerTable:
        """The layer's tables as they are now."""
        return open_table(self._layout.layer_dir(key), self._layout.key)


class ShownTree:
    """What the domain's FUSE filesystem shows, by the names that the daemon gives."""

    def __init__(
        self,
        index: DomainIndex,
        maps: Maps,
        views: Views,
        starts: Starts,
        libraries: Libraries,
        resident: Resident,
    ) -> None:
        self.files = DomainFs(libraries.read, {})
        self.resident = resident
        """The index, and maps that the kernel reads: what is asked for while the disk fails."""
        self._index = index
        self._maps = maps
        self._views = views
        self._starts = starts
        self._shown: dict[str, frozenset[str]] = {}
        """Names of views, by what shows them: a view itself, or a tree."""
        self._paths: dict[str, str] = {}
        """Of the maps of single views."""

    def maps(self) -> set[str]:
        """See core.domain_cache.Shown."""
        return {parse_view_name(view).map_id for view in self.views()}

    def views(self) -> set[str]:
        """See core.domain_cache.Shown."""
        return {view for views in self._shown.values() for view in views}

    def show_views(self, names: Sequence[str]) -> None:
        """See core.domain.Shown."""
        for name in names:
            path = self._paths[name] = self._path_of(name)
            self.files.add_map(name, self._maps.load(path))
            self.resident.add(path)
            self._show(name, [name])

    def show_again(self, views: Sequence[str], trees: Sequence[worker_api.Tree]) -> None:
        """What a predecessor showed; what is damaged meanwhile is no reason to show nothing."""
        single = [partial(self.show_views, [name]) for name in views]
        for show in (*single, *(partial(self.show_tree, tree) for tree in trees)):
            try:
                show()
            except NsfsError as error:
                log.warning("what is mounted cannot be shown again: %s", error)

    def hide_views(self, names: Sequence[str]) -> None:
        """See core.domain.Shown."""
        for name in names:
            self.files.remove_map(name)
            self._hide(name)
            self.resident.drop(self._paths.pop(name, ""))

    def _show(self, by: str, views: Sequence[str]) -> None:
        self._shown[by] = frozenset(views)
        self._views.reopen(views)

    def _hide(self, by: str) -> None:
        """Whoever still waits for a view that nothing shows any more has lost his mount."""
        gone = self._shown.pop(by, frozenset()).difference(*self._shown.values())
        self._views.close(gone)

    def _path_of(self, view: str) -> str:
        map_id = parse_view_name(view).map_id
        record = self._index.map(map_id)
        if record is None:
            raise NotFoundError(f"no such map in this domain: {map_id}")
        return record.path

    def show_tree(self, tree: worker_api.Tree) -> None:
        """See core.domain.Shown."""
        images = [self._maps.open(info.path) for info in tree.maps]
        views = tree.views()
        self.files.add_tree(tree.id, UnionTree(images), views, {"mount.json": partial(self._describe, tree)})
        self._show(f"tree/{tree.id}", views)

    def _describe(self, tree: worker_api.Tree) -> bytes:
        return worker_api.render_mount(tree.info, usage_of([info.id for info in tree.maps], self._views, self._starts))

    def hide_tree(self, tree_id: str) -> None:
        """See core.domain.Shown."""
        self.files.remove_tree(tree_id)
        self._hide(f"tree/{tree_id}")


def fetch_config(config: Config) -> FetchConfig:
    """What the configuration says of fetching.

    A range whose turn it is has a connection; the first step of a read-ahead is no longer than the longest.
    """
    usual = FetchConfig()
    return FetchConfig(
        places=min(config.fetch.concurrency, range_connections(config.registry.connections)),
        read_ahead_least=min(usual.read_ahead_least, config.fetch.read_ahead),
        read_ahead_most=config.fetch.read_ahead,
        background_rate=config.fetch.complete_rate,
    )


def host_platform() -> Platform:
    """The platform of this machine's own programs."""
    return Platform(platform.machine(), "linux").normal()
