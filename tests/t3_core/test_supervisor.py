"""Workers' lives: started when needed, again when they die, with what their domain needs; and who waits for them."""

import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from msgspec import Struct

from nsfs.core import worker_api
from nsfs.errors import CorruptError, NotFoundError, NsfsError, UnreachableError
from nsfs.model.policy import Domain, Isolation
from nsfs.serve.config import Config
from nsfs.serve.kept import Connection
from nsfs.serve.supervisor import Supervisor, open_supervisor, plan_pause
from nsfs.serve.wire import Peer, open_peer
from nsfs.serve.worker_args import Ready, WorkerArgs
from trio_tests import run

SHARED = Domain("shared", Isolation.SHARED)
EMPTY = worker_api.Empty()
INIT = bytes(56) + (1 << 7).to_bytes(4, "little")
"""Of a kernel that repeats what a worker had taken."""


class Worker:
    """One worker's life, in a task of this process; the child that its supervisor sees."""

    def __init__(self, host: "Zygote", args: WorkerArgs, number: int) -> None:
        self.host = host
        self.args = args
        self.pid = number
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def live(self, stream: trio.SocketStream) -> None:
        with self.scope:
            async with stream:
                await self.host.script(self, stream)
        self.ended.set()

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    async def wait_gone(self) -> None:
        await self.ended.wait()

    def kill(self) -> None:
        self.scope.cancel()

    def close(self) -> None:
        self.host.closed += 1


class Zygote:
    """Starts workers that do what `script` says."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.workers: list[Worker] = []
        self.closed = 0
        self.broken = 0
        """So many starts fail."""
        self.script: Callable[[Worker, trio.SocketStream], Any] = self.serve
        self.asked: list[tuple[int, str]] = []
        self.handlers: dict[str, Callable[[Worker], Any]] = {}

    async def spawn(
        self, entry: str, args: WorkerArgs, fds: Sequence[int], *, session: bool, tied: bool, confinement: object
    ) -> Worker:
        await trio.lowlevel.checkpoint()
        if self.broken:
            self.broken -= 1
            raise UnreachableError("cannot start a process: the fork server died")
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(args), type=WorkerArgs)
        worker = Worker(self, sent, len(self.workers) + 1)
        self.workers.append(worker)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(_duplicate(fds[0])))
        self.nursery.start_soon(worker.live, stream)
        return worker

    async def serve(self, worker: Worker, stream: trio.SocketStream) -> None:
        """As a good worker does."""
        methods = {name: (kind, self._handler(worker, name)) for name, kind in _METHODS.items()}
        async with open_peer(stream, methods, name="shared") as peer:
            await self.greet(peer)
            await peer.wait_closed()

    async def greet(self, peer: Peer) -> None:
        await peer.call("Ready", Ready(), worker_api.Empty)

    def _handler(self, worker: Worker, name: str) -> Any:
        async def handle(_params: Struct, _report: object) -> Struct:
            self.asked.append((worker.pid, name))
            if name in self.handlers:
                await self.handlers[name](worker)
            return EMPTY

        return handle


def _duplicate(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))


_METHODS: dict[str, type[Struct]] = {
    "Prepare": worker_api.Empty,
    "List": worker_api.Empty,
    "Status": worker_api.Empty,
    "ShowViews": worker_api.Views,
    "HideViews": worker_api.Views,
    "ShowTree": worker_api.Tree,
    "HideTree": worker_api.TreeGone,
}


class Fuse:
    """Connections: the write end of a pipe, which has POLLERR once the read end is closed."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, int]] = []
        self.closed: list[str] = []
        self.error: Exception | None = None

    async def connect(self, domain: str) -> Connection:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        ends = os.pipe()
        self.opened.append(ends)
        return Connection(ends[1], f"/run/{domain}/{len(self.opened)}", INIT)

    async def disconnect(self, connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        self.closed.append(connection.mountpoint)

    def abort(self) -> None:
        os.close(self.opened[-1][0])


class Store:
    """Domains are directories; keys that were destroyed are noted."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.destroyed: list[tuple[str, bool]] = []
        """Names, and whether the directory was there."""

    def open(self, name: str) -> tuple[int, int]:
        return os.memfd_create("bitmap"), os.memfd_create("key")

    def destroy_key(self, name: str) -> None:
        self.destroyed.append((name, os.path.exists(f"{self.directory}/{name}")))

    def delete(self, name: str) -> None:
        shutil.rmtree(f"{self.directory}/{name}", ignore_errors=True)


class Terms:
    """Remembers what it was told; refuses as often as it is to."""

    keeper = None

    def __init__(self, *refusals: NsfsError | None) -> None:
        self.refusals = list(refusals)
        self.told: list[tuple[str, object]] = []

    async def confinement(self, domain: str, owner: str) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(("confinement", (domain, owner)))
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal

    def lent(self, domain: str, owner: str) -> dict[str, Any]:
        del domain, owner
        return {}

    async def asked(self, domain: str, params: Struct) -> None:
        self.told.append(("asked", (domain, params)))

    def started(self, domain: str, owner: str, pid: int) -> None:
        self.told.append(("started", (domain, owner, pid)))

    async def ended(self, domain: str) -> None:
        self.told.append(("ended", domain))


@asynccontextmanager
async def supervised(
    fuse: Fuse | None = None, directory: str = "/nonexistent", terms: "Terms | None" = None
) -> AsyncIterator[tuple[Supervisor, Zygote]]:
    fuse = fuse or Fuse()
    async with trio.open_nursery() as nursery:
        zygote: Any = Zygote(nursery)
        async with open_supervisor(
            Config(root="/r", run="/r", socket="/r/s"),
            zygote,
            connect=fuse.connect,
            disconnect=fuse.disconnect,
            store=Store(directory),
            terms=terms or Terms(),
        ) as supervisor:
            yield supervisor, zygote
        nursery.cancel_scope.cancel()


@contextmanager
def no_descriptor_is_left(fuse: Fuse) -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    kept = {str(read) for read, _ in fuse.opened}
    assert set(os.listdir("/proc/self/fd")) - before <= kept


async def hang(*_: object) -> None:
    await trio.sleep_forever()


async def ask(supervisor: Supervisor, method: str = "Prepare", params: Struct = EMPTY) -> None:
    await supervisor.call(SHARED, method, params, worker_api.Empty)


def test_a_worker_starts_with_the_first_call_and_serves_all() -> None:
    fuse = Fuse()

    async def body() -> None:
        async with supervised(fuse) as (supervisor, zygote):
            assert supervisor.pids() == {}
            await ask(supervisor)
            await ask(supervisor)
            assert supervisor.pids() == {"shared": 1}
            (worker,) = zygote.workers
            assert (worker.args.fuse, worker.args.init, zygote.closed) == (True, INIT, 0)
        assert fuse.closed == ["/run/shared/1"]
        assert zygote.closed == 1

    with no_descriptor_is_left(fuse):
        run(body)


def test_a_new_worker_gets_what_the_last_one_showed() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            await ask(supervisor, "ShowViews", worker_api.Views(names=["a", "b", "c"]))
            await ask(supervisor, "HideViews", worker_api.Views(names=["b"]))
            await ask(supervisor, "ShowTree", worker_api.Tree(id="t", maps=[]))
            await ask(supervisor, "ShowTree", worker_api.Tree(id="u", maps=[]))
            await ask(supervisor, "HideTree", worker_api.TreeGone(id="t"))
            zygote.workers[0].kill()
            await ask(supervisor)
            args = zygote.workers[1].args
            assert (args.views, [tree.id for tree in args.trees]) == (["a", "c"], ["u"])

    run(body)


def test_callers_wait_for_the_next_worker_and_nobody_wakes_too_early() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            silent = [True]

            async def sometimes_silent(worker: Worker, stream: trio.SocketStream) -> None:
                """The first three die before they answer."""
                if worker.pid <= 3:
                    async with open_peer(stream, {}, name="shared"):
                        await trio.sleep(2)
                    return
                silent.clear()
                await zygote.serve(worker, stream)

            zygote.script = sometimes_silent
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask, supervisor)
            assert not silent
            assert {pid for pid, _ in zygote.asked} == {4}
            assert len(zygote.asked) == 5

    run(body)


def test_a_call_waits_half_a_minute_and_not_for_ever() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):

            async def dies(worker: Worker, stream: trio.SocketStream) -> None:
                del worker, stream

            zygote.script = dies
            begun = trio.current_time()
            with pytest.raises(UnreachableError, match="does not start"):
                await ask(supervisor)
            assert trio.current_time() - begun == pytest.approx(30)
            assert 10 < len(zygote.workers) < 25

    run(body)


def test_a_worker_that_never_answers_is_killed_and_another_one_started() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):

            async def hangs(worker: Worker, stream: trio.SocketStream) -> None:
                if worker.pid == 1:
                    await trio.sleep_forever()
                await zygote.serve(worker, stream)

            zygote.script = hangs
            with pytest.raises(UnreachableError):
                await ask(supervisor)
            await trio.sleep(120)
            await ask(supervisor)
            assert zygote.asked == [(2, "Prepare")]

    run(body)


def test_how_things_stand_is_said_at_once() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):

            async def status() -> None:
                await supervisor.ask_now("shared", "Status", EMPTY, worker_api.Empty)

            with pytest.raises(UnreachableError, match="no worker runs"):
                await status()
            begun = trio.current_time()
            await ask(supervisor)
            await status()
            zygote.script = hang
            zygote.workers[0].kill()
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(UnreachableError, match="is being started"):
                await status()
            assert trio.current_time() - begun < 1
            assert supervisor.pids() in ({"shared": 0}, {"shared": 2})

    run(body)


def test_a_worker_that_is_stopped_does_not_stop_who_asks_how_it_stands() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            zygote.handlers["Status"] = hang
            await ask(supervisor)
            with pytest.raises(UnreachableError, match="does not answer"):
                await supervisor.ask_now("shared", "Status", EMPTY, worker_api.Empty)
            assert trio.current_time() < 2

    run(body)


def test_who_cannot_wait_has_a_worker_that_is_stuck_followed_by_another_within_a_second() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            await supervisor.rouse(SHARED)
            zygote.handlers["Status"] = hang
            await ask(supervisor)
            await supervisor.rouse(SHARED)
            await supervisor.call(SHARED, "HideViews", worker_api.Views(names=["gone"]), worker_api.Empty)
            assert zygote.asked[-1] == (2, "HideViews")
            assert trio.current_time() < 1

    run(body)


def test_a_worker_that_answers_is_spared() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            await ask(supervisor)
            zygote.handlers["Prepare"] = hang
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, supervisor)
                await trio.testing.wait_all_tasks_blocked()
                await supervisor.rouse(SHARED)
                nursery.cancel_scope.cancel()
            assert len(zygote.workers) == 1

    run(body)


async def die(worker: Worker) -> None:
    worker.kill()
    await trio.sleep_forever()


def test_a_call_under_way_is_asked_of_the_next_worker_once() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):

            async def die_first(worker: Worker) -> None:
                if worker.pid == 1:
                    await die(worker)

            zygote.handlers["Prepare"] = die_first
            await ask(supervisor)
            assert zygote.asked == [(1, "Prepare"), (2, "Prepare")]

    run(body)


def test_a_call_that_kills_workers_is_given_up() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            zygote.handlers["Prepare"] = die
            with pytest.raises(UnreachableError, match="gone"):
                await ask(supervisor)
            assert len(zygote.asked) == 2

    run(body)


def test_a_listing_is_not_begun_anew() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            zygote.handlers["List"] = die
            with pytest.raises(UnreachableError, match="gone"):
                await ask(supervisor, "List")
            assert zygote.asked == [(1, "List")]

    run(body)


def test_what_a_worker_raises_is_raised_and_not_asked_again() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):

            async def refuse(_worker: Worker) -> None:
                raise CorruptError("bad layer")

            async def unreachable(_worker: Worker) -> None:
                raise UnreachableError("registry is down")

            for handler, kind in ((refuse, CorruptError), (unreachable, UnreachableError)):
                zygote.handlers["Prepare"] = handler
                with pytest.raises(kind):
                    await ask(supervisor)
            assert len(zygote.asked) == 2

    run(body)


def test_a_fork_server_that_is_gone_for_a_while_costs_time_and_nothing_else() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            zygote.broken = 5
            await ask(supervisor)
            assert supervisor.pids() == {"shared": 1}

    run(body)


def test_where_there_is_no_connection_the_caller_hears_why_and_nothing_is_kept() -> None:
    fuse = Fuse()

    async def body() -> None:
        async with supervised(fuse) as (supervisor, _):
            fuse.error = NotFoundError("no /dev/fuse")
            for _ in range(2):
                with pytest.raises(NotFoundError):
                    await ask(supervisor)
            assert supervisor.pids() == {}
            fuse.error = None
            await ask(supervisor)

    with no_descriptor_is_left(fuse):
        run(body)


def test_a_caller_who_is_cancelled_while_a_domain_is_made_leaves_nothing() -> None:
    fuse = Fuse()

    async def body() -> None:
        async with supervised(fuse) as (supervisor, _):
            with trio.CancelScope() as scope:
                scope.cancel()
                await ask(supervisor)
            assert supervisor.pids() == {}
            await ask(supervisor)

    with no_descriptor_is_left(fuse):
        run(body)


def test_a_connection_that_was_aborted_is_opened_again() -> None:
    fuse = Fuse()

    async def body() -> None:
        async with supervised(fuse) as (supervisor, zygote):
            await ask(supervisor)
            fuse.abort()
            zygote.workers[0].kill()
            await ask(supervisor)
            assert fuse.closed == ["/run/shared/1"]
            assert len(fuse.opened) == 2

    run(body)


def test_the_end_of_a_domain_takes_its_worker_connection_and_directory(tmp_path: Any) -> None:
    fuse = Fuse()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "disk").write_bytes(b"x")

    async def body() -> None:
        async with supervised(fuse, str(tmp_path)) as (supervisor, zygote):
            await ask(supervisor)
            await supervisor.end(SHARED)
            assert zygote.workers[0].ended.is_set()
            assert fuse.closed == ["/run/shared/1"]
            assert supervisor.pids() == {}
            assert not (tmp_path / "shared").exists()
            await supervisor.end(SHARED)

    with no_descriptor_is_left(fuse):
        run(body)


def test_the_end_of_a_domain_wakes_who_waits_for_its_worker() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            zygote.script = hang
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    with pytest.raises(UnreachableError, match="has ended"):
                        await ask(supervisor)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                await supervisor.end(SHARED)
            assert trio.current_time() < 1

    run(body)


def test_a_connection_that_cannot_be_unmounted_is_closed_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Fuse):
        async def disconnect(self, connection: Connection) -> None:
            raise UnreachableError("hangs")

    fuse = Stuck()

    async def body() -> None:
        async with supervised(fuse) as (supervisor, _):
            await ask(supervisor)
            await supervisor.end(SHARED)

    with no_descriptor_is_left(fuse):
        run(body)
    assert "left mounted" in caplog.text


def test_a_worker_killed_in_service_is_replaced_at_once_and_one_that_dies_at_start_ever_later() -> None:
    assert plan_pause(1, has_answered=True) == plan_pause(1, has_answered=False) == 0
    pauses = [plan_pause(deaths, has_answered=False) for deaths in range(1, 40)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 5
    assert max(plan_pause(deaths, has_answered=True) for deaths in range(1, 40)) == 0.5


def test_workers_that_serve_and_are_killed_are_replaced_without_delay() -> None:
    async def body() -> None:
        async with supervised() as (supervisor, zygote):
            await ask(supervisor)
            for _ in range(20):
                await trio.sleep(2)
                zygote.workers[-1].kill()
                await trio.testing.wait_all_tasks_blocked()
                before = trio.current_time()
                await ask(supervisor)
                assert trio.current_time() - before < 0.1

    run(body)


def test_who_calls_first_is_told_why_there_can_be_no_worker() -> None:
    fuse, terms = Fuse(), Terms(NotFoundError("namespace.a.netns: no such network namespace: /x"))

    async def body() -> None:
        async with supervised(fuse, terms=terms) as (supervisor, zygote):
            with pytest.raises(NotFoundError, match="no such network namespace"):
                await ask(supervisor)
            assert (fuse.opened, zygote.workers, supervisor.pids()) == ([], [], {})
            await ask(supervisor)
            assert ("started", ("shared", "", 1)) in terms.told
            assert ("asked", ("shared", EMPTY)) in terms.told
            await supervisor.end(SHARED)
            assert terms.told[-1] == ("ended", "shared")

    run(body)


def test_who_waits_for_a_worker_that_cannot_follow_is_told_why() -> None:
    gone = NotFoundError("namespace.a.netns: no such network namespace: /x")
    terms = Terms(None, None, *([gone] * 1000))

    async def body() -> None:
        async with supervised(terms=terms) as (supervisor, zygote):
            await ask(supervisor)
            zygote.workers[0].kill()
            await zygote.workers[0].ended.wait()
            with pytest.raises(UnreachableError, match="does not start") as caught:
                await ask(supervisor)
            assert "no such network namespace" in str(caught.value.hint)
            terms.refusals.clear()
            await ask(supervisor)

    run(body)
