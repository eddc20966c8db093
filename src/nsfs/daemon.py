"""The daemon: composition root of mounts, workers and the control socket.

One daemon owns one `root` and one `run` directory, by a lock on the first. It starts its fork server before anything
here starts a thread. A private daemon belongs to one user and ends with its last mount, once nobody has called for a
moment; with it ends whatever it had made. The system's daemon may end, or be killed, at any time: workers serve on, and
the next one goes on with them. SIGTERM ends it so; SIGHUP, too, and what is installed and configured then takes its
place; SIGINT, a terminal's Ctrl-C, takes all its mounts away before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from nsfs import __version__
from nsfs.core.cache import Cache
from nsfs.core.clones import Clones
from nsfs.core.deletions import Deletions
from nsfs.core.lazy import LazyConfig, LazyLayers
from nsfs.core.manual import Lowers, ManualMounts
from nsfs.core.namespaces import Namespaces, NoSnapshots
from nsfs.core.scopes import Scopes
from nsfs.core.snapshots import open_snapshots
from nsfs.core.tasks import open_tasks
from nsfs.errors import BusyError, DeniedError, NotFoundError, NsfsError, UnsupportedError
from nsfs.model.cache import Limits
from nsfs.model.encryption import Encrypt
from nsfs.model.mounts import Host
from nsfs.model.profile import ProfileUse
from nsfs.remote.hosts import HostsDirectory
from nsfs.remote.reference import parse_reference
from nsfs.serve import doctor, mounts
from nsfs.serve.accounts import Accounts
from nsfs.serve.build import identify
from nsfs.serve.caching import Caching
from nsfs.serve.containerd import Runtime, open_containerd
from nsfs.serve.control import Control
from nsfs.serve.control_rpc import control_service
from nsfs.serve.credentials import Keychain
from nsfs.serve.dumps import forbid_core_dumps
from nsfs.serve.entrance import listening
from nsfs.serve.fdstore import HolderStore, Notifier, SystemdStore
from nsfs.serve.forkclient import launch_server, open_fork_server
from nsfs.serve.fronts import open_fronts
from nsfs.serve.hostfiles import HostFiles
from nsfs.serve.keeping import Keeper
from nsfs.serve.kept import Connection
from nsfs.serve.kernel import READ_AHEAD_KB, HostKernel, UserKernel
from nsfs.serve.lending import Lending
from nsfs.serve.lifecycle import End, Ending, Lifecycle, replace_us
from nsfs.serve.logs import counted_bugs
from nsfs.serve.metrics import Metrics
from nsfs.serve.policy_file import load_policy
from nsfs.serve.porter import PorterArgs, post_porter
from nsfs.serve.relay import Broker
from nsfs.serve.rpc import serve_rpc
from nsfs.serve.sandbox import module_paths, plan_front_sandbox, plan_readable
from nsfs.serve.scrapes import serve_scrapes
from nsfs.serve.session import read_init
from nsfs.serve.snapshots_rpc import snapshots_service
from nsfs.serve.supervisor import open_supervisor
from nsfs.serve.tenancy import Tenancy
from nsfs.serve.terms import Lender, RootTerms, UserTerms, check_uids
from nsfs.store.domains import Domains
from nsfs.store.keys import Keys, load_host_key
from nsfs.store.layout import Layout
from nsfs.store.meta import open_meta
from nsfs.store.snapshots import SnapshotDirs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from nsfs.core.snapshots import Snapshots
    from nsfs.serve.config import Config
    from nsfs.serve.entrance import Entrance
    from nsfs.serve.forkclient import ForkServer, ServerProcess
    from nsfs.serve.keeping import Left
    from nsfs.serve.sandbox import Place
    from nsfs.serve.supervisor import Supervisor, Terms
    from nsfs.store.meta import Meta

log = logging.getLogger(__name__)

_WARM: Final = [
    "nsfs.worker:warm_up",
    "nsfs.layer_jobs",
    "nsfs.front",
    "nsfs.serve.mounts",
    "nsfs.serve.warming",
    "nsfs.serve.porter",
]
_FOR_MOUNTS: Final = {"fuse", "/dev/fuse", "fusermount3"}
"""What a user can do without as long as nothing is mounted; root's workers cannot."""
_TIDY_EVERY: Final = 1.0
"""Seconds between looks for mounts that others took away."""
_OF_WHAT_IS_FREE: Final = 0.6
"""Part of it that pools may take where nobody says how much."""
_LINGER: Final = 5
"""So many looks without a mount or a call end a private daemon."""


def run(config: Config, *, private: bool) -> None:
    """Serve until a signal or `Drain`, or, a private daemon, until nobody needs it; raises BusyError, DeniedError."""
    layout = Layout(config.root, config.run)
    if os.geteuid() == 0:
        check_uids(config)
    os.umask(0o022)  # what is nobody else's business says so by itself; workers must reach what is made for them
    _allow_descriptors()
    forbid_core_dumps()
    with _owned(layout):
        zygote = launch_server(_WARM)
        if not private:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # where nobody listens, since an upgrade is under way
        how = trio.run(_serve, config, layout, zygote, private)
    if how is End.REPLACE:
        replace_us()


def _allow_descriptors() -> None:
    """As many as may be, for us and for what we start: a worker has a few for each layer that it serves."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _owned(layout: Layout) -> Iterator[None]:
    """The directories, ours alone."""
    for path in (layout.root, layout.run):
        try:
            os.makedirs(path, 0o700, exist_ok=True)
            os.chmod(path, 0o700)
        except OSError as error:
            raise DeniedError(
                f"cannot make {path}: {error.strerror}", hint="run as root, or set root and run"
            ) from None
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(fd, layout.root)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, root: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"another daemon owns {root}", hint="set another root, run and socket") from None


@dataclass(frozen=True, slots=True)
class _Site:
    """What all of a daemon is made over."""

    config: Config
    layout: Layout
    private: bool
    server: ForkServer
    meta: Meta
    host: Host
    notifier: Notifier
    keeper: Keeper | None = None
    """What outlives us; None of a private daemon."""
    left: tuple[Left, ...] = ()

    @property
    def is_system(self) -> bool:
        """Root's own daemon, and not a private one."""
        return self.host.root and not self.private


@dataclass(frozen=True, slots=True)
class _Workers:
    """The domains, and what they may ask of us."""

    supervisor: Supervisor
    store: Domains
    keychain: Keychain
    broker: Broker
    files: HostFiles


@dataclass(frozen=True, slots=True)
class _Mounts:
    """What is mounted."""

    manual: ManualMounts
    lowers: Lowers
    scopes: Scopes
    kernel: HostKernel


async def _serve(config: Config, layout: Layout, zygote: ServerProcess, private: bool) -> End:  # noqa: FBT001
    async with AsyncExitStack() as stack:
        site = await _open_site(stack, config, layout, zygote, private=private)
        workers = await _open_workers(stack, site)
        mounted = await _open_mounts(stack, site, workers)
        cache = Cache(
            workers.supervisor, workers.store, _limits(site, workers.store), _quotas(config), refuses=site.host.root
        )
        control = Control(
            config,
            mounted.manual,
            workers.supervisor,
            mounted.scopes,
            workers.keychain,
            cache,
            private=private,
        )
        snapshots = await _open_snapshots(stack, site, workers, mounted) if site.is_system else None
        namespaces = _make_namespaces(site, workers, mounted, snapshots)
        accounts, ending = Accounts(site.meta, workers.supervisor), Ending()
        lifecycle = Lifecycle(ending, namespaces, mounted.manual, site.keeper)
        groups = (
            control,
            Tenancy(config, mounted.scopes, namespaces, workers.supervisor, control, accounts, workers.broker),
            lifecycle,
            Caching(cache, control),
        )
        handlers = {name: handler for group in groups for name, handler in group.handlers().items()}
        services = [control_service(handlers), *([snapshots_service(snapshots)] if snapshots else [])]
        metrics = Metrics(workers.supervisor, namespaces, accounts, cache, stack.enter_context(counted_bugs()))
        entrance = listening(config.socket, site.keeper.relieve if site.keeper else list)
        async with (
            serve_scrapes(config.metrics.listen, metrics.render),
            serve_rpc(entrance, services, partial(_leave, ending, site)),
        ):
            log.info("nsfs %s serves at %s", __version__, config.socket)
            site.notifier.tell("READY=1")
            beside = [] if private else list(_besides(config, lifecycle, namespaces))
            kernel = mounted.kernel
            starting = [kernel.follow_starts, kernel.warming.follow]
            followed = [workers.files.follow, cache.watch, *starting, accounts.follow, *beside]
            await _wait_end(ending, mounted.manual, control, followed)
            site.notifier.tell("RELOADING=1" if ending.how is End.REPLACE else "STOPPING=1")
        ends = [mounted.manual.end_all, *([snapshots.end] if snapshots else [])]
        await _finish(ending, workers.supervisor, ends, site.keeper)
    return ending.how


async def _open_site(
    stack: AsyncExitStack, config: Config, layout: Layout, zygote: ServerProcess, *, private: bool
) -> _Site:
    site = _Site(
        config,
        layout,
        private,
        server=await stack.enter_async_context(open_fork_server(zygote, partial(launch_server, _WARM))),
        meta=stack.enter_context(open_meta(layout.meta)),
        host=await trio.to_thread.run_sync(host_of, config, os.environ, os.geteuid()),
        notifier=Notifier(os.environ),
    )
    if not site.is_system:
        return site
    keeper, left = await stack.enter_async_context(_open_keeper(layout, site.notifier))
    return replace(site, keeper=keeper, left=tuple(left))


async def _open_workers(stack: AsyncExitStack, site: _Site) -> _Workers:
    config, layout = site.config, site.layout
    connections, store = _Connections(layout), _open_store(config, layout, site.host)
    keychain, broker = Keychain(config, layout, os.environ, private=site.private), Broker(config)
    files = HostFiles()
    lender = Lender(Lending(HostsDirectory(config.registry.config_path), site.meta), keychain, broker)
    supervisor = await stack.enter_async_context(
        open_supervisor(
            config,
            site.server,
            connect=connections.connect if site.host.root else None,
            disconnect=connections.disconnect,
            store=store,
            terms=_make_terms(site, lender, files),
        )
    )
    broker.connect(supervisor)
    return _Workers(supervisor, store, keychain, broker, files)


async def _open_mounts(stack: AsyncExitStack, site: _Site, workers: _Workers) -> _Mounts:
    """Go on with what an earlier daemon left mounted."""
    supervisor = workers.supervisor
    kernel = HostKernel(site.layout, site.host, site.server)
    if not site.host.root:
        fronts = await stack.enter_async_context(open_fronts(site.server, partial(plan_front_sandbox, _readable())))
        kernel = UserKernel(site.layout, site.host, site.server, supervisor.bitmap, fronts)
    lowers = Lowers(kernel, supervisor, site.meta)
    scopes = Scopes(load_policy(site.config), _complete, root=site.host.root)
    manual = ManualMounts(site.meta, supervisor, kernel, site.host, scopes, lowers)
    adopted = supervisor.adopt(site.left)
    await manual.resume(adopted)
    await trio.to_thread.run_sync(workers.store.drop_lost, adopted)
    return _Mounts(manual, lowers, scopes, kernel)


async def _open_snapshots(stack: AsyncExitStack, site: _Site, workers: _Workers, mounted: _Mounts) -> Snapshots:
    config, kernel = site.config, mounted.kernel
    profile = ProfileUse(config.containerd.profile)
    choice = LazyConfig(wait=config.prepare_wait, strict=config.prepare == "strict", profile=profile)
    clones = Clones(kernel, possible=site.host.idmap)
    lazy = LazyLayers(workers.supervisor, mounted.lowers, clones, site.host, mounted.scopes, choice)
    directories = SnapshotDirs(site.layout.snapshots, site.layout.lowers)
    runtime = Runtime(config.containerd.address)
    return await stack.enter_async_context(
        open_snapshots(site.meta, directories, lazy, clones, empty=kernel.empty, runtime=runtime)
    )


def _make_namespaces(site: _Site, workers: _Workers, mounted: _Mounts, snapshots: Snapshots | None) -> Namespaces:
    owners = _Owners(workers.keychain, workers.broker, workers.store, site.meta)
    return Namespaces(mounted.manual, snapshots or NoSnapshots(), mounted.lowers, workers.store, site.meta, owners)


async def _leave(ending: Ending, site: _Site, entrance: Entrance) -> float:
    """Have who comes from now on wait for the daemon that follows; for how long calls under way are waited for."""
    if site.keeper is not None and ending.follows_within:
        try:
            pid = os.getpid() if ending.how is End.REPLACE else 0
            args = PorterArgs(patience=ending.follows_within, pid=pid)
            await site.keeper.post(await post_porter(site.server, entrance.listener, args))
            entrance.is_left = True
        except NsfsError as error:
            log.warning("who connects before another daemon serves is refused: %s", error)
    return ending.patience


async def _finish(
    ending: Ending, supervisor: Supervisor, ends: Sequence[Callable[[], Awaitable[None]]], keeper: Keeper | None
) -> None:
    """Take everything away by `ends`, or leave it as it is."""
    if ending.how is End.TAKE_AWAY or keeper is None:
        supervisor.end_all()
        for end in ends:
            await end()
    elif ending.how is End.REPLACE:
        keeper.carry()


class _Owners:
    """`core.namespaces.Owners`."""

    def __init__(self, keychain: Keychain, broker: Broker, store: Domains, meta: Meta) -> None:
        self.logins = keychain.logins
        self._keychain = keychain
        self._broker = broker
        self._store = store
        self._meta = meta

    async def forget(self, owner: str) -> None:
        """Nobody of that name is left: who comes later has neither the credentials nor the grants, and pays nothing."""
        await trio.to_thread.run_sync(self._meta.forget_costs, owner)
        await self._broker.forget(owner, await trio.to_thread.run_sync(self._store.names))
        await self._keychain.forget(owner)  # last: who has nothing else is known by it


def _limits(site: _Site, store: Domains) -> Limits:
    """How much pools may take; where nobody says it, most of what was free at the first start ever."""
    pool = site.config.pool
    most = pool.max_bytes or site.meta.pool_cap(int(store.free() * _OF_WHAT_IS_FREE))
    return Limits(most=int(most), reserve=int(pool.reserve), high=pool.high, low=pool.low)


def _quotas(config: Config) -> dict[str, int]:
    return {owner: namespace.quota for owner, namespace in config.namespace.items()}


def _complete(reference: str) -> str:
    """As registries know it: what users leave out is there."""
    return str(parse_reference(reference))


@asynccontextmanager
async def _open_keeper(layout: Layout, notifier: Notifier) -> AsyncIterator[tuple[Keeper, list[Left]]]:
    """What outlives us, in systemd's store where it has one, else in a process that is there for that."""
    build = await trio.to_thread.run_sync(identify)
    holder = None if "FDSTORE" in os.environ else HolderStore(layout.holder)
    keeper = Keeper(holder or SystemdStore(notifier, os.environ), layout, build)
    left = await trio.to_thread.run_sync(keeper.take)
    async with open_tasks() as tasks:
        if holder is not None:
            tasks.start_soon(_watch_holder, holder)
        yield keeper, left
    keeper.close()


async def _watch_holder(store: HolderStore) -> None:
    """Have another where the holder of now is killed."""
    while True:
        await trio.lowlevel.wait_readable(store.fileno())
        log.warning("the process that held descriptors is gone: another one follows")
        try:
            await trio.to_thread.run_sync(store.restore)
        except NsfsError as error:
            log.warning("this daemon's domains would end with it: %s", error)
        await trio.sleep(_TIDY_EVERY)


def host_of(config: Config, environ: Mapping[str, str], uid: int) -> Host:
    """What this host can do and the configuration allows."""
    report = doctor.examine(config, environ, uid)
    missing = [name for name in report.missing if uid == 0 or name not in _FOR_MOUNTS]
    if missing:
        raise UnsupportedError(f"this host lacks what nsfs needs: {', '.join(missing)}", hint="see nsfs doctor")
    used = {feature.name for feature in report.features if feature.used}
    erofs = not used.isdisjoint({"erofs from files", "loop devices"})
    return Host(
        root=uid == 0,
        erofs=erofs,
        file_backed="erofs from files" in used,
        directio=config.kernel.directio and not used.isdisjoint({"erofs directio", "loop devices"}),
        idmap=erofs and {"idmapped mounts", "user namespaces"} <= used,
    )


def _readable() -> tuple[Place, ...]:
    """What workers and fronts may read beside what is theirs."""
    return plan_readable(module_paths(sys.path, sys.argv[0]), os.environ)


def _make_terms(site: _Site, lender: Lender, files: HostFiles) -> Terms:
    """On what terms workers are started here."""
    readable = _readable()
    if not site.host.root:
        return UserTerms(site.layout, readable, lender)
    terms = RootTerms(site.config, site.layout, site.meta, readable, lender, files, site.keeper)
    terms.sweep()
    return terms


def _open_store(config: Config, layout: Layout, host: Host) -> Domains:
    """What domains have on disk; only root's are encrypted, since its workers alone read what is theirs."""
    if not host.root and config.encrypt is Encrypt.ALL:
        raise UnsupportedError("encryption needs root: encrypt = all", hint="encrypt the disk that your home is on")
    host_key = load_host_key(config.key_file, os.environ.get("CREDENTIALS_DIRECTORY", ""))
    return Domains(layout, Keys(layout, host_key), config.encrypt if host.root else Encrypt.OFF)


class _Connections:
    """Domains' FUSE connections."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    async def connect(self, domain: str) -> Connection:
        """Open and mount the connection of `domain`."""
        target = self._layout.domain_run(domain).fuse
        with suppress(NotFoundError):
            mounts.unmount(target, detach=True)
        os.makedirs(target, 0o700, exist_ok=True)
        with ExitStack() as undo:
            fd = _open_fuse()
            undo.callback(os.close, fd)
            mounts.mount_fuse(target, fd)
            undo.callback(mounts.unmount, target, detach=True)
            mounts.set_read_ahead(mounts.find_mount(target).device, READ_AHEAD_KB)
            connection = Connection(fd, target, await read_init(fd))
            undo.pop_all()
        return connection

    async def disconnect(self, connection: Connection) -> None:
        """Take it away; readers that wait get an error."""
        mounts.unmount(connection.mountpoint, detach=True)
        with suppress(OSError):
            os.removedirs(connection.mountpoint)


def _open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            f"cannot open /dev/fuse: {error.strerror}", hint="modprobe fuse; see nsfs doctor"
        ) from None


def _besides(config: Config, lifecycle: Lifecycle, namespaces: Namespaces) -> Iterator[Callable[[], Awaitable[None]]]:
    """What the system's daemon does beside serving."""
    yield partial(_obey_hangups, lifecycle)
    if address := config.containerd.address:
        connect = partial(open_containerd, address.removeprefix("unix://"), "default")
        yield Deletions(connect, config.socket, namespaces).watch


async def _obey_hangups(lifecycle: Lifecycle) -> None:
    """Give our place to what is installed, configured and ruled now; what is not right changes nothing."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _ in signals:
            try:
                await lifecycle.upgrade()
            except NsfsError as error:
                log.warning("SIGHUP changes nothing: %s", error)


async def _wait_end(
    ending: Ending, manual: ManualMounts, control: Control, beside: Sequence[Callable[[], Awaitable[None]]]
) -> None:
    """Until somebody asks for it, or until a private daemon is not needed; does what is `beside` meanwhile."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey_signals, ending)
        nursery.start_soon(_tidy, ending, manual, control)
        for each in beside:
            nursery.start_soon(each)
        await ending.asked.wait()
        nursery.cancel_scope.cancel()


async def _obey_signals(ending: Ending) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("ends by %s", signal.Signals(number).name)
            ending.ask(End.LEAVE if number == signal.SIGTERM else End.TAKE_AWAY)


async def _tidy(ending: Ending, manual: ManualMounts, control: Control) -> None:
    idle, handled = 0, 0
    count = _MountCount(manual)
    while not control.private or idle < _LINGER:
        await trio.sleep(_TIDY_EVERY)
        used = await count.take() > 0 or control.running > 0 or control.handled != handled
        idle, handled = 0 if used else idle + 1, control.handled
    log.info("ends, because nobody needs it")
    ending.ask(End.TAKE_AWAY)


class _MountCount:
    """How many mounts there are, once those that others took away are given up; also where one cannot be."""

    def __init__(self, manual: ManualMounts) -> None:
        self._manual = manual
        self._count = 0
        self._trouble = ""
        """What was told of last, which may last for as long as a disk is read-only."""

    async def take(self) -> int:
        """Now, or, where that cannot be said, when it last could; tells of a trouble once."""
        trouble = ""
        try:
            self._count = len(self._manual.records())
            self._count = await self._manual.forget_gone()
        except NsfsError as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            log.warning("cannot look after the mounts: %s", trouble)
        self._trouble = trouble
        return self._count
