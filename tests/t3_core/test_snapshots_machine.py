"""The snapshot service against a dict, in any order of calls, with restarts of the daemon in between."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
import trio.from_thread
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from nsfs.core.clones import Clones
from nsfs.core.snapshots import Caller, Snapshots, open_snapshots
from nsfs.errors import BusyError, ExistsError, NotFoundError, NsfsError, UnsupportedError, UsageError
from nsfs.model.snapshot import Kind
from nsfs.store.meta import open_meta
from nsfs.store.snapshots import SnapshotDirs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nsfs.model.lazy import LazyLayer
    from nsfs.model.policy import Domain, ScopeRequest

PLUGINS = ("nsfs", "nsfs-shared")
NAMESPACES = ("a", "b")


class NothingLazy:
    """No worker serves anything."""

    wait = 1.0

    def is_guest(self, request: ScopeRequest) -> bool:
        return False

    async def offer(self, request: ScopeRequest, layer: LazyLayer, *, over_local: bool) -> LazyLayer:
        raise UnsupportedError("nothing is served on demand here")

    async def settle(self, request: ScopeRequest, layer: LazyLayer) -> LazyLayer:
        raise AssertionError

    async def stack(self, snapshot: int, request: ScopeRequest, layers: object, shift: object, profile: object) -> Any:
        raise AssertionError

    async def release(self, snapshot: int) -> None:
        raise AssertionError

    def shown(self) -> dict[int, Domain]:
        return {}

    def stacked(self) -> dict[int, list[str]]:
        return {}


class NoKernel:
    """Nothing is mounted."""

    async def mount_clones(self, clones: object, shift: object) -> None:
        raise AssertionError

    async def unmount(self, paths: object, *, force: bool) -> None:
        raise AssertionError

    def lower_path(self, name: str) -> str:
        raise AssertionError


class NothingElse:
    """Nothing is ever fenced off, so nobody is told."""

    async def delete_images(self, namespace: str, name: str, manifest: str) -> int:
        raise AssertionError

    async def remove_snapshots(self, namespace: str, snapshotter: str, keys: Sequence[str]) -> None:
        raise AssertionError


class Daemon:
    """The service in a thread, over a real store."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))
        self._thread.start()
        assert self._ready.wait(60)

    async def _serve(self) -> None:
        directories = SnapshotDirs(f"{self._path}/snapshots", f"{self._path}/l")
        with open_meta(f"{self._path}/meta") as meta:
            clones = Clones(NoKernel(), possible=False)
            async with open_snapshots(
                meta, directories, NothingLazy(), clones, empty="/empty", runtime=NothingElse()
            ) as self.service:
                self._token = trio.lowlevel.current_trio_token()
                self._end = trio.Event()
                self._ready.set()
                await self._end.wait()

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        async def run() -> Any:
            result = method(self.service, *arguments)
            return await result if hasattr(result, "__await__") else result

        return trio.from_thread.run(run, trio_token=self._token)

    def end(self) -> None:
        self._token.run_sync_soon(self._end.set)
        self._thread.join(60)
        assert not self._thread.is_alive()


class Known(NamedTuple):
    kind: Kind
    parent: str
    labels: dict[str, str]


class Name(NamedTuple):
    plugin: str
    namespace: str
    key: str


LABELS = st.dictionaries(st.sampled_from(["containerd.io/gc.root", "l", "m"]), st.sampled_from(["", "1", "2"]))
PLUGIN = st.sampled_from(PLUGINS)
NAMESPACE = st.sampled_from(NAMESPACES)
KEY = st.integers(0, 5)


class Machine(RuleBasedStateMachine):
    names = Bundle("names")
    bases = Bundle("bases")
    """Committed at some time."""

    def __init__(self) -> None:
        super().__init__()
        shm = "/dev/shm"
        self.path = tempfile.mkdtemp(prefix="nsfs-", dir=shm if os.path.isdir(shm) else None)
        self.known: dict[str, dict[str, Known]] = {plugin: {} for plugin in PLUGINS}
        self.daemon = Daemon(self.path)

    def teardown(self) -> None:
        self.daemon.end()
        shutil.rmtree(self.path)

    @initialize(target=bases)
    def first_base(self) -> Any:
        return self.unpack_one(None, PLUGINS[0], 0)

    @initialize(target=names)
    def first_name(self) -> Any:
        return self.create(Kind.VIEW, Name(PLUGINS[0], NAMESPACES[0], f"{NAMESPACES[0]}/0/k"), None, {})

    def expect(self, error: type[NsfsError] | None, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = self.daemon.call(method, *arguments)
        except NsfsError as raised:
            assert error is type(raised), raised  # noqa: PT017
            return None
        assert error is None
        return result

    def refuses_creation(self, plugin: str, namespace: str, key: str, parent: str) -> type[NsfsError] | None:
        known = self.known[plugin]
        if parent and (parent not in known or not parent.startswith(f"{namespace}/")):
            return NotFoundError
        if parent and known[parent].kind is not Kind.COMMITTED:
            return UsageError
        return ExistsError if key in known else None

    def create(self, kind: Kind, name: Name, parent: Name | None, labels: dict[str, str]) -> Any:
        error = self.refuses_creation(name.plugin, name.namespace, name.key, parent.key if parent else "")
        mounts = self.expect(
            error, Snapshots.create, Caller(name.plugin), kind, name.key, parent.key if parent else "", labels
        )
        if error:
            return multiple()
        kept = {label: value for label, value in labels.items() if value}
        self.known[name.plugin][name.key] = Known(kind, parent.key if parent else "", kept)
        assert mounts == self.daemon.call(Snapshots.mounts, Caller(name.plugin, name.namespace), name.key)
        return name

    @rule(
        target=names,
        kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]),
        plugin=PLUGIN,
        namespace=NAMESPACE,
        key=KEY,
        labels=LABELS,
    )
    def create_base(self, kind: Kind, plugin: str, namespace: str, key: int, labels: dict[str, str]) -> Any:
        return self.create(kind, Name(plugin, namespace, f"{namespace}/{key}/k"), None, labels)

    @rule(
        target=names,
        kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]),
        parent=st.one_of(bases, bases, names),
        namespace=NAMESPACE,
        key=KEY,
        labels=LABELS,
        same=st.sampled_from([True, True, True, False]),
    )
    def create_over(
        self, kind: Kind, parent: Name, namespace: str, key: int, labels: dict[str, str], same: bool
    ) -> Any:
        namespace = parent.namespace if same else namespace
        return self.create(kind, Name(parent.plugin, namespace, f"{namespace}/{key}/k"), parent, labels)

    @rule(target=bases, active=names, key=KEY, labels=LABELS)
    def commit_any(self, active: Name, key: int, labels: dict[str, str]) -> Any:
        return self.commit(active, key, labels)

    def commit(self, active: Name, key: int, labels: dict[str, str]) -> Any:
        known = self.known[active.plugin]
        name = f"{active.namespace}/{key}/committed"
        error: type[NsfsError] | None = None
        if name in known:
            error = ExistsError
        elif active.key not in known:
            error = NotFoundError
        elif known[active.key].kind is not Kind.ACTIVE:
            error = BusyError
        self.expect(error, Snapshots.commit, Caller(active.plugin), name, active.key, "", labels)
        if error:
            return multiple()
        kept = {label: value for label, value in labels.items() if value}
        known[name] = known.pop(active.key)._replace(kind=Kind.COMMITTED, labels=kept)
        return active._replace(key=name)

    @rule(target=bases, parent=st.one_of(st.none(), bases), plugin=PLUGIN, key=KEY)
    def unpack(self, parent: Name | None, plugin: str, key: int) -> Any:
        return self.unpack_one(parent, plugin, key)

    def unpack_one(self, parent: Name | None, plugin: str, key: int) -> Any:
        """A layer, as containerd makes it."""
        namespace = parent.namespace if parent else NAMESPACES[0]
        active = Name(parent.plugin if parent else plugin, namespace, f"{namespace}/{key}/extract")
        if self.create(Kind.ACTIVE, active, parent, {}) != active:
            return multiple()
        return self.commit(active, key, {})

    @rule(name=st.one_of(names, bases))
    def remove(self, name: Name) -> None:
        known = self.known[name.plugin]
        error: type[NsfsError] | None = None
        if name.key not in known:
            error = NotFoundError
        elif any(each.parent == name.key for each in known.values()):
            error = BusyError
        self.expect(error, Snapshots.remove, Caller(name.plugin), name.key)
        if error is None:
            del known[name.key]

    @rule(plugin=PLUGIN)
    def empty(self, plugin: str) -> None:
        """Children before parents, as containerd's garbage collection does."""
        known = self.known[plugin]
        while known:
            for key in [key for key in known if not any(each.parent == key for each in known.values())]:
                self.expect(None, Snapshots.remove, Caller(plugin), key)
                del known[key]

    @rule(name=st.one_of(names, bases), labels=LABELS, whole=st.booleans())
    def update(self, name: Name, labels: dict[str, str], whole: bool) -> None:
        known = self.known[name.plugin]
        paths = ["labels"] if whole else ["labels.l"]
        error = None if name.key in known else NotFoundError
        record = self.expect(error, Snapshots.update, Caller(name.plugin), name.key, labels, paths)
        if record is not None:
            wanted = labels if whole else {**known[name.key].labels, "l": labels.get("l", "")}
            wanted = {label: value for label, value in wanted.items() if value}
            known[name.key] = known[name.key]._replace(labels=wanted)
            assert record.labels == wanted
            assert record.updated >= record.created

    @rule(name=st.one_of(names, bases))
    def a_neighbour_finds_nothing(self, name: Name) -> None:
        other = Caller(name.plugin, next(each for each in NAMESPACES if each != name.namespace))
        self.expect(NotFoundError, Snapshots.mounts, other, name.key)
        self.expect(NotFoundError, Snapshots.remove, other, name.key)

    @rule(name=st.one_of(names, bases))
    def use(self, name: Name) -> None:
        error = None if name.key in self.known[name.plugin] else NotFoundError
        usage = self.expect(error, Snapshots.usage, Caller(name.plugin), name.key)
        assert error or usage.inodes == 1

    @rule()
    def clean_up(self) -> None:
        self.daemon.call(Snapshots.cleanup)
        alive = sum(map(len, self.known.values()))
        assert len(os.listdir(f"{self.path}/snapshots")) == alive

    @rule()
    def restart(self) -> None:
        self.daemon.end()
        self.daemon = Daemon(self.path)

    @invariant()
    def everything_is_as_known(self) -> None:
        for plugin, known in self.known.items():
            found = self.daemon.call(Snapshots.select, Caller(plugin), [])
            assert {each.name: Known(each.kind, each.parent, each.labels) for each in found} == known
            assert len({each.id for each in found}) == len(found)
            for namespace in NAMESPACES:
                filters = ["kind==committed", "labels.l==2"]
                own = self.daemon.call(Snapshots.select, Caller(plugin, namespace), filters)
                assert {each.name for each in own} == {
                    key
                    for key, each in known.items()
                    if key.startswith(f"{namespace}/") and (each.kind is Kind.COMMITTED or each.labels.get("l") == "2")
                }


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=30)
