"""Workers: one process per domain, started when it is first needed and started again when it dies.

Owns, per domain, what must outlive a worker: the /dev/fuse descriptor (so the connection stays), the live bitmap and
the key (memfds), the INIT that the kernel sent, and what the domain shows. A new worker gets all of it and goes on
where the last one was killed. One that dies again and again, or does not answer, is given longer and longer pauses,
never given up. Where there is a keeper, all of it outlives the daemon, too: the next one gives workers a new socket.

Concurrency: one task per domain keeps its worker; callers wait on an event until it answers. Who asks how things stand
(`ask_now`) waits for no start. Nothing here touches a path below a FUSE mount.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import msgspec
import trio
from msgspec import Struct

from nsfs.core import worker_api
from nsfs.core.tasks import open_tasks, running
from nsfs.errors import NsfsError, UnreachableError, UsageError
from nsfs.model.policy import owner_of, parse_view_name
from nsfs.serve.children import cancel_when_gone, end_child, end_trial, status_of
from nsfs.serve.config import Config, pack_config
from nsfs.serve.forkclient import find_process
from nsfs.serve.joblending import ENTRY as JOB_SERVER
from nsfs.serve.joblending import JobServerArgs, TakeJobServer
from nsfs.serve.keeping import BITMAP, FAR_LINE, FUSE, KEY, LINE
from nsfs.serve.kept import Connection, Kept
from nsfs.serve.lending import MAX_ASKED
from nsfs.serve.line import Line, drain, make_line, send_end, send_over
from nsfs.serve.renewal import try_beside
from nsfs.serve.session import clone_device, is_connected, offers_resend
from nsfs.serve.wire import PassingStream, Peer, open_peer
from nsfs.serve.worker_args import Ready, WorkerArgs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from nsfs.model.policy import Domain
    from nsfs.serve.forkclient import Child, ForkServer
    from nsfs.serve.keeping import Keeper, Left
    from nsfs.serve.sandbox import Confinement
    from nsfs.serve.wire import Methods

T = TypeVar("T")
log = logging.getLogger(__name__)

_ENTRY: Final = "nsfs.worker:main"
_CALLER_WAITS: Final = 30.0
"""Seconds that a call waits for a worker that is being started."""
_STUCK: Final = 120.0
"""Seconds after which a worker that does not answer yet is killed: it clears up behind its predecessor before."""
_ADOPTED: Final = 10.0
"""Seconds that a worker has to greet a new daemon; reads go on meanwhile."""
_ANSWERS_AT_ONCE: Final = 1.0
"""Seconds that a worker has to say how it stands."""
_ROUSED: Final = 0.5
"""Seconds in which it has to say anything, where somebody cannot wait for longer."""
_SERVED: Final = 0.1
"""A worker that answered for so many seconds has served, and its death is no sequel of the last one's."""
_GRACE: Final = 3.0
"""Seconds for a worker to make durable what it wrote, after its daemon has let go of it."""
_ATTEMPTS: Final = 2
"""Workers that are asked in turn, where one dies meanwhile: enough for an accident, too few for a poisonous call."""
_CHANGES: Final = frozenset({"ShowViews", "HideViews", "ShowTree", "HideTree"})
"""What the next worker must know of."""
_ONCE: Final = frozenset({"List", "Tree", "Read"})
"""What cannot be asked of the next worker, since part of it was reported to somebody. All else may be done twice."""


class DomainStore(Protocol):
    """What domains have on disk. Its calls block."""

    def open(self, name: str) -> tuple[int, int]:
        """Begin a domain, or go on with it; descriptors of its live bitmap and its key."""

    def destroy_key(self, name: str) -> None:
        """Have nobody able to read what the domain has on disk."""

    def delete(self, name: str) -> None:
        """Delete it."""


class Terms(Protocol):
    """On what terms a domain's workers are started."""

    @property
    def keeper(self) -> Keeper | None:
        """For workers that outlive us; None: ours end with us."""

    async def confinement(self, domain: str, owner: str) -> Confinement | None:
        """What the next worker is held to, None for nothing. Raises NsfsError where that cannot be had."""

    def lent(self, domain: str, owner: str) -> Methods:
        """What a worker may ask of the daemon, beside telling that it is ready; no `owner`: several share it."""

    async def asked(self, domain: str, params: Struct) -> None:
        """Somebody who reaches the daemon asks this of the worker, which is not asked yet."""

    def started(self, domain: str, owner: str, pid: int) -> None:
        """A worker answers, of ours or of an earlier daemon's: do for it what it may not do itself."""

    async def ended(self, domain: str) -> None:
        """There is no worker any more, and shall be none; its directory is deleted, as far as that went."""


def plan_pause(deaths: int, *, has_answered: bool) -> float:
    """Seconds before a worker is started again after so many deaths in a row; short if the last one had answered."""
    if deaths <= 1:
        return 0.0
    first, longest = (0.005, 0.5) if has_answered else (0.01, 5.0)
    return min(longest, first * 2.0 ** min(deaths, 10))


class Supervisor:
    """The service. Made by `open_supervisor`."""

    def __init__(
        self,
        config: Config,
        zygote: ForkServer,
        nursery: trio.Nursery,
        *,
        connect: Callable[[str], Awaitable[Connection]] | None,
        disconnect: Callable[[Connection], Awaitable[None]],
        store: DomainStore,
        terms: Terms,
    ) -> None:
        self._config = config
        self._zygote = zygote
        self._nursery = nursery
        self._connect = connect
        self._disconnect = disconnect
        self._store = store
        self._terms = terms
        self._keeper = terms.keeper
        self.build = terms.keeper.build if terms.keeper else ""
        """Of what code we are, and so the workers that we start (`serve.build`)."""
        self.is_ending = False
        """Set by `open_supervisor`: what ends from now on ends because we do."""
        self._kept: dict[str, Kept] = {}
        self._lock = trio.Lock()
        self._renewing = trio.Lock()

    async def call(
        self,
        domain: Domain,
        method: str,
        params: Struct,
        result: type[T],
        report: Callable[[Any], Awaitable[None]] | None = None,
        fds: Sequence[int] = (),
    ) -> T:
        """Ask the worker of `domain`; raises what it raises, UnreachableError where there is none or it dies meanwhile.

        What can be asked twice is asked of the next worker, too.
        """
        kept = await self._keep(domain)
        kept.note(method, params)
        kept.owners.add(domain.owner)
        if method in _CHANGES:
            self._note(kept)
        await self._terms.asked(domain.name, params)
        left = 1 if method in _ONCE else _ATTEMPTS
        while True:
            peer = await self._wait_peer(kept)
            left -= 1
            try:
                return await peer.call(method, params, result, report, worker_api.OnTheWay, fds)
            except UnreachableError:
                if not left or not peer.is_closed:
                    raise
                log.info("the worker of domain %s died during %s, which is asked of the next", kept.domain, method)

    async def ask_now(self, domain: str, method: str, params: Struct, result: type[T]) -> T:
        """Ask a worker that runs; raises UnreachableError, which says how it stands, where none answers at once."""
        kept = self._kept.get(domain)
        if kept is None:
            raise UnreachableError("no worker runs")
        peer = kept.peer if kept.ready.is_set() else None
        if peer is None:
            raise UnreachableError("the worker is being started")
        with trio.move_on_after(_ANSWERS_AT_ONCE):
            return await peer.call(method, params, result)
        raise UnreachableError("the worker does not answer")

    async def rouse(self, domain: Domain) -> None:
        """Have no worker there that does not answer at once: it is killed, and the next one asked what comes."""
        kept = self._kept.get(domain.name)
        peer, worker = (kept.peer, kept.worker) if kept is not None else (None, None)
        if peer is None or worker is None:
            return
        with trio.move_on_after(_ROUSED) as asking, suppress(UnreachableError):
            await peer.call("Status", worker_api.StatusRequest(measured=False), worker_api.Empty)
        if asking.cancelled_caught:
            log.warning("the worker of domain %s is ended, because it does not answer: pid %d", domain.name, worker.pid)
            worker.kill()

    async def end(self, domain: Domain) -> None:
        """Destroy the domain's key, end the worker and its connection, and delete what the domain has on disk."""
        async with self._lock:
            await trio.to_thread.run_sync(self._store.destroy_key, domain.name)
            kept = self._kept.pop(domain.name, None)
            if kept is not None:
                kept.is_over = kept.is_deleted = True
                kept.scope.cancel()
                await kept.ended.wait()
            await trio.to_thread.run_sync(self._store.delete, domain.name)
            await self._terms.ended(domain.name)

    def adopt(self, left: Sequence[Left]) -> set[str]:
        """Go on with the domains of an earlier daemon, whether their workers live or not; gives their names.

        One whose connection is gone is nothing to go on with.
        """
        adopted = set()
        for each in left:
            line = Line(each.fds[LINE], each.fds[FAR_LINE])
            connection = Connection(each.fds[FUSE], each.memo.mountpoint, each.memo.init)
            kept = Kept(each.memo.domain, each.memo.owner, each.fds[BITMAP], each.fds[KEY], connection, line)
            kept.views, kept.trees = set(each.memo.views), {tree.id: tree for tree in each.memo.trees}
            kept.survivor = find_process(*each.memo.worker)
            end_trial(kept.survivor, find_process(*each.memo.trial))
            self._kept[kept.domain] = kept
            self._nursery.start_soon(self._run, kept)
            adopted.add(kept.domain)
        return adopted

    def end_all(self) -> None:
        """Leave nothing to a next daemon: all workers and connections end with us."""
        for kept in self._kept.values():
            kept.is_over = True

    def outdated(self) -> list[str]:
        """Domains whose workers are of other code than we, and will be replaced."""
        return [name for name, kept in self._kept.items() if kept.is_outdated and not kept.is_kept_back]

    def kept_back(self) -> list[str]:
        """Domains whose workers are of other code than we, and stay, since new ones did not answer."""
        return [name for name, kept in self._kept.items() if kept.is_kept_back]

    def owners(self, domain: str) -> set[str]:
        """On whose behalf somebody called into a domain, or has a view there."""
        kept = self._kept.get(domain)
        return set() if kept is None else kept.owners | {parse_view_name(view).reader for view in kept.views}

    def owned(self) -> dict[str, str]:
        """The domains that are one owner's and have a worker, and whose they are."""
        return {name: kept.owner for name, kept in self._kept.items() if kept.owner and kept.worker}

    def pids(self) -> dict[str, int]:
        """The worker of each domain that has one; 0 while it is being started."""
        return {name: kept.worker.pid if kept.worker else 0 for name, kept in self._kept.items()}

    def restarts(self) -> dict[str, int]:
        """How often the worker of each domain was started again since we have the domain."""
        return {name: kept.restarts for name, kept in self._kept.items()}

    def bitmap(self, domain: str) -> int:
        """The descriptor of the live bitmap of a domain whose worker was called before."""
        return self._kept[domain].bitmap

    async def _keep(self, domain: Domain) -> Kept:
        name = domain.name
        if name in self._kept:
            return self._kept[name]
        async with self._lock:
            if name not in self._kept:
                self._kept[name] = await self._open(domain)
                self._nursery.start_soon(self._run, self._kept[name])
            return self._kept[name]

    async def _open(self, domain: Domain) -> Kept:
        await self._terms.confinement(domain.name, owner_of(domain))  # whoever calls first is told what is wrong
        bitmap, key = await trio.to_thread.run_sync(self._store.open, domain.name)
        try:
            connection = await self._connect(domain.name) if self._connect else None
        except BaseException:
            os.close(bitmap)
            os.close(key)
            raise
        line = make_line() if self._keeper else None
        kept = Kept(domain.name, owner_of(domain), bitmap, key, connection, line)
        await self._hand_over(kept)
        return kept

    async def _hand_over(self, kept: Kept) -> None:
        """Have the domain outlive us. Where that cannot be, it works all the same, for as long as we do."""
        if self._keeper is None:
            return
        try:
            with trio.CancelScope(shield=True):
                await self._keeper.keep(kept.domain, kept.kept())
        except NsfsError as error:
            log.warning("domain %s will end with this daemon: %s", kept.domain, error)
        self._note(kept)

    def _note(self, kept: Kept) -> None:
        if self._keeper is None:
            return
        try:
            self._keeper.note(kept.memo())
        except OSError as error:
            log.warning("domain %s will end with this daemon: %s", kept.domain, error)

    async def _wait_peer(self, kept: Kept) -> Peer:
        with trio.move_on_after(_CALLER_WAITS):
            while not kept.ended.is_set():
                await kept.ready.wait()
                if kept.peer is not None:
                    return kept.peer
            raise UnreachableError(f"domain has ended: {kept.domain}")
        raise UnreachableError(
            f"the worker of domain {kept.domain} does not start: no answer within {_CALLER_WAITS:g} s",
            hint=kept.trouble or "the daemon's log says more",
        )

    async def _run(self, kept: Kept) -> None:
        """Keep a worker running until the domain ends."""
        try:
            with kept.scope:
                while True:
                    has_answered = await self._live(kept)
                    kept.restarts += 1
                    await trio.sleep(plan_pause(kept.deaths, has_answered=has_answered))
        finally:
            with trio.CancelScope(shield=True):
                await self._drop(kept)

    async def _live(self, kept: Kept) -> bool:
        """One worker's life, whatever its end; whether it came to answer."""
        has_answered = False
        try:
            await self._ensure_connection(kept)
            has_answered = await self._run_once(kept)
        except NsfsError as error:
            log.warning("the worker of domain %s cannot be started: %s", kept.domain, error)
            kept.trouble = error.message
        except Exception:
            log.exception("a bug: the worker of domain %s cannot be started", kept.domain)
        has_served = has_answered and trio.current_time() - kept.answered >= _SERVED
        kept.deaths = 1 if has_served else kept.deaths + 1
        return has_answered

    async def _ensure_connection(self, kept: Kept) -> None:
        """Open another connection where the one there is was unmounted or aborted: no worker can use it again."""
        if self._connect is None or (kept.connection is not None and is_connected(kept.connection.fd)):
            return
        if kept.connection is not None:
            log.warning("the fuse connection of domain %s is gone: what is mounted over it fails", kept.domain)
            connection, kept.connection = kept.connection, None
            await self._close(connection)
        kept.connection = await self._connect(kept.domain)
        await self._hand_over(kept)

    async def _close(self, connection: Connection) -> None:
        try:
            await self._disconnect(connection)
        except NsfsError as error:
            log.warning("a fuse connection is left mounted: %s: %s", connection.mountpoint, error)
        finally:
            os.close(connection.fd)

    async def _drop(self, kept: Kept) -> None:
        try:
            if not self._is_left(kept):
                await self._take_away(kept)
                await self._terms.ended(kept.domain)
            elif kept.connection is not None:
                os.close(kept.connection.fd)
        finally:
            if kept.is_deleted:
                os.pwrite(kept.key, bytes(os.fstat(kept.key).st_size), 0)
            os.close(kept.key)
            os.close(kept.bitmap)
            if kept.line is not None:
                kept.line.close()
            kept.ended.set()
            kept.ready.set()

    def _is_left(self, kept: Kept) -> bool:
        """It is for the next daemon now."""
        return self._keeper is not None and self.is_ending and not kept.is_over

    async def _take_away(self, kept: Kept) -> None:
        if self._keeper is not None:
            await self._keeper.forget(kept.domain, frozenset(kept.kept()))
        if kept.survivor is not None:
            await end_child(kept.survivor, 0)
        if kept.connection is not None:
            await self._close(kept.connection)

    async def _run_once(self, kept: Kept) -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        async with PassingStream(ours, only_sends=True) as stream:
            with theirs:
                child, limit = await self._begin(kept, theirs)
            kept.worker = child
            self._note(kept)
            try:
                has_answered = await self._serve(kept, stream, child, limit)
                log.warning("the worker of domain %s died: pid %d%s", kept.domain, child.pid, await status_of(child))
            finally:
                kept.worker = None
                if self._is_left(kept):
                    child.close()
                else:
                    await self._end_child(kept, child)
                    await kept.end_forks()
        return has_answered

    async def _end_child(self, kept: Kept, child: Child) -> None:
        """The line is for one worker: for the one that ends, where another has not taken its place already."""
        line = kept.line if kept.survivor is None else None
        if line is not None:
            with suppress(UnreachableError):
                send_end(line)
        await end_child(child, 0 if kept.scope.cancel_called else _GRACE)
        if line is not None:
            drain(line)

    async def _begin(self, kept: Kept, theirs: socket.socket) -> tuple[Child, float]:
        """A worker at the other end of `theirs`: one that survived, or a new one; and how long it may take to greet."""
        survivor, kept.survivor = kept.survivor, None
        if survivor is not None and kept.line is not None:
            log.info("a worker goes on with a new daemon: domain %s, pid %d", kept.domain, survivor.pid)
            try:
                send_over(kept.line, theirs)
            except UnreachableError:
                await end_child(survivor, 0)
                raise
            return survivor, _ADOPTED
        return await self._spawn(kept, theirs, is_trial=False), _STUCK

    async def _spawn(self, kept: Kept, theirs: socket.socket, *, is_trial: bool) -> Child:
        outlives = kept.line is not None
        confinement = await self._terms.confinement(kept.domain, kept.owner)
        with ExitStack() as stack:
            fds = [theirs.fileno(), kept.bitmap, kept.key]
            clones = self._clones(kept, stack)
            fds += [kept.connection.fd, *clones] if kept.connection else []
            fds += [kept.line.far] if kept.line else []
            args = msgspec.structs.replace(self._args(kept), is_trial=is_trial, clone=bool(clones))
            return await self._zygote.spawn(
                _ENTRY, args, fds, session=outlives, tied=not outlives, confinement=confinement
            )

    async def _lend_forks(self, kept: Kept) -> None:
        """Give the worker, which asks for it, a fork server that is held to what it is held to itself."""
        peer, outlives = await self._wait_peer(kept), kept.line is not None
        confinement = await self._terms.confinement(kept.domain, kept.owner)
        args = JobServerArgs(
            log_format=self._config.log_format, log_level=self._config.log_level, memory=self._memory(kept)
        )
        async with kept.forking:
            await kept.end_forks()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours, theirs:
                kept.forks = await self._zygote.spawn(
                    JOB_SERVER, args, [theirs.fileno()], session=outlives, tied=not outlives, confinement=confinement
                )
                await peer.call("TakeJobServer", TakeJobServer(), worker_api.Empty, fds=[ours.fileno()])

    def _memory(self, kept: Kept) -> int:
        return int(self._config.of_namespace(kept.owner).memory)

    def _clones(self, kept: Kept, stack: ExitStack) -> list[int]:
        """A device of the worker's own, where the kernel does not repeat what it takes; our copy goes with `stack`."""
        connection = kept.connection
        if connection is None or (self._config.kernel.resend and offers_resend(connection.init)):
            return []
        clone = clone_device(connection.fd)
        stack.callback(os.close, clone)
        return [clone]

    async def _renew(self, kept: Kept, old: Child) -> None:
        """Replace a worker of other code than ours by one of ours, one domain after the other."""

        async def start(theirs: socket.socket) -> Child:
            child = kept.trial = await self._spawn(kept, theirs, is_trial=True)
            self._note(kept)
            return child

        async with self._renewing:
            if kept.peer is None:
                return
            log.info("the worker of domain %s runs other code than we do: pid %d", kept.domain, old.pid)
            try:
                fuse_fd = kept.connection.fd if kept.connection else None
                kept.survivor = await try_beside(old, fuse_fd, start, self._terms.lent(kept.domain, kept.owner))
            except NsfsError as error:
                kept.is_kept_back = True
                log.warning("the worker of domain %s stays as it is: %s", kept.domain, error)
            finally:
                kept.trial = None
                self._note(kept)

    async def _serve(self, kept: Kept, stream: trio.abc.Stream, child: Child, limit: float) -> bool:
        """Be the worker's other side until it is gone, or does not answer in time; whether it came to answer."""
        has_answered = False
        with trio.move_on_after(limit) as starting, suppress(UnreachableError):

            async def ready(params: Ready, _report: object) -> worker_api.Empty:
                if kept.ready.is_set():
                    raise UsageError("a worker is ready once")
                kept.is_outdated = params.build != self.build
                if kept.is_outdated:
                    self._nursery.start_soon(self._renew, kept, child)
                starting.deadline = math.inf
                self._terms.started(kept.domain, kept.owner, child.pid)
                kept.trouble, kept.answered = "", trio.current_time()
                kept.ready.set()
                return worker_api.Empty()

            async def lend(_params: worker_api.Empty, _report: object) -> worker_api.Empty:
                await self._lend_forks(kept)
                return worker_api.Empty()

            lent = self._terms.lent(kept.domain, kept.owner)
            methods: Methods = {"Ready": (Ready, ready), "JobServer": (worker_api.Empty, lend), **lent}
            async with (
                running(partial(cancel_when_gone, child, starting)),
                open_peer(stream, methods, name="daemon", most=MAX_ASKED) as peer,
            ):
                kept.peer = peer
                try:
                    await peer.wait_closed()
                finally:
                    has_answered = kept.lose()
        return has_answered

    def _args(self, kept: Kept) -> WorkerArgs:
        connection = kept.connection
        return WorkerArgs(
            domain=kept.domain,
            config=pack_config(self._config.for_worker(kept.owner)),
            build=self.build,
            fuse=connection is not None,
            memory=self._memory(kept),
            line=kept.line is not None,
            is_shared=not kept.owner and self._connect is not None,
            init=connection.init if connection else b"",
            views=sorted(kept.views),
            trees=list(kept.trees.values()),
        )


@asynccontextmanager
async def open_supervisor(
    config: Config,
    zygote: ForkServer,
    *,
    connect: Callable[[str], Awaitable[Connection]] | None,
    disconnect: Callable[[Connection], Awaitable[None]],
    store: DomainStore,
    terms: Terms,
) -> AsyncIterator[Supervisor]:
    """A Supervisor whose workers end with the block, but where there is a keeper and nobody has said `end_all`.

    `connect` opens and mounts a domain's FUSE connection (None: workers without).
    """
    async with open_tasks() as nursery:
        supervisor = Supervisor(
            config,
            zygote,
            nursery,
            connect=connect,
            disconnect=disconnect,
            store=store,
            terms=terms,
        )
        try:
            yield supervisor
        finally:
            supervisor.is_ending = True
