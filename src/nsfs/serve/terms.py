"""On what terms workers are started: `serve.supervisor.Terms`, for root's daemon and for a user's.

Owns, for root, that every domain has a uid of its own, under which its directory is; what of [namespace.<name>] its
worker is held to; and what the daemon does for a worker that may not do it itself. A user's workers keep the uid. A
namespace whose settings cannot be met has no worker, and its callers the reason; no other namespace notices.

Concurrency: deciding blocks, in a thread, one domain at a time. Invariants: a uid is durable before anything belongs
to it, and is forgotten only after everything that did is gone.
"""

from __future__ import annotations

import fcntl
import grp
import logging
import os
import pwd
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.errors import NotFoundError, NsfsError, UsageError
from nsfs.model.uids import find_overlap, parse_uid_range, plan_uid
from nsfs.serve.cgroups import find_parents, make_leaves, remove_leaves
from nsfs.serve.fusectl import raise_background
from nsfs.serve.hostfiles import RESOLV_CONF
from nsfs.serve.mounts import find_mount
from nsfs.serve.sandbox import plan_sandbox, plan_user_sandbox
from nsfs.serve.session import Limits
from nsfs.store.layout import escape_component
from nsfs.store.owners import give_to, owners

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msgspec import Struct

    from nsfs.serve.config import Config, Namespace
    from nsfs.serve.hostfiles import HostFiles
    from nsfs.serve.keeping import Keeper
    from nsfs.serve.lending import Lending
    from nsfs.serve.sandbox import Confinement, Place
    from nsfs.serve.wire import Methods
    from nsfs.store.layout import Layout

log = logging.getLogger(__name__)

_GET_NSTYPE, _NETWORK = 0xB703, 0x40000000  # include/uapi/linux/nsfs.h, sched.h
_ACCOUNTS: Final = (("/etc/passwd", "/etc/subuid"), ("/etc/group", "/etc/subgid"))
_SPARED: Final = -999
"""oom_score_adj: nearly the last that a host without memory kills, as all who read wait for it."""


class Owned(Protocol):
    """Remembers whose uid is whose. Blocks; durable when a method returns."""

    def uids(self) -> dict[str, int]:
        """Of every domain that has one."""

    def latest_uid(self) -> int:
        """The one that was given out last; 0 where none was."""

    def put_uid(self, domain: str, uid: int) -> None:
        """Give one out."""

    def forget_domain(self, domain: str) -> None:
        """Nothing is left of it."""


def check_uids(config: Config) -> None:
    """Raise UsageError where `uid_range` is malformed, or has numbers that somebody on this host has. Blocks."""
    wanted = parse_uid_range(config.uid_range)
    for accounts, delegated in _ACCOUNTS:
        line = find_overlap(wanted, _text(accounts), _text(delegated))
        if line is not None:
            raise UsageError(
                f"uid_range {wanted} overlaps what others have, in {accounts} or {delegated}: {line}",
                hint="set uid_range to numbers that nobody has",
            )


def check_namespaces(config: Config) -> None:
    """Raise NsfsError, naming the key, for the first namespace whose worker could not be started. Blocks."""
    for name, settings in config.namespace.items():
        check_settings(name, settings)


def check_settings(name: str, settings: Namespace) -> None:
    """Raise NsfsError, naming the key, where what [namespace.`name`] asks for is not there."""
    with _naming(f"namespace.{name}.netns"):
        _check_netns(settings.netns)
    with _naming(f"namespace.{name}.cgroup"):
        if settings.cgroup:
            find_parents(settings.cgroup)
    if settings.resolv_conf and not os.path.isfile(settings.resolv_conf):
        raise NotFoundError(f"namespace.{name}.resolv_conf: no such file: {settings.resolv_conf}")


def resolv_conf_of(settings: Namespace) -> str:
    """By which file names are resolved; "" for the host's. As ip-netns(8) has it, /etc/netns/<name>/resolv.conf."""
    usual = f"/etc/netns/{os.path.basename(settings.netns)}/{RESOLV_CONF}" if settings.netns else ""
    return settings.resolv_conf or (usual if os.path.isfile(usual) else "")


class Keys(Protocol):
    """Credentials, by whose they are."""

    def methods(self, owner: str) -> Methods:
        """What a worker of `owner` may ask, "" for one that several share."""


class Relaying(Protocol):
    """Ways from a domain that several share to each owner's own worker."""

    def methods(self, domain: str) -> Methods:
        """What the worker of `domain` may ask."""


class Lender:
    """What the daemon does for its workers while they run."""

    def __init__(self, lending: Lending, keys: Keys, relaying: Relaying) -> None:
        self._lending = lending
        self._keys = keys
        self._relaying = relaying

    def lent(self, domain: str, owner: str) -> Methods:
        """See Terms."""
        relays = {} if owner else self._relaying.methods(domain)
        return {**self._lending.methods(domain), **self._keys.methods(owner), **relays}

    async def asked(self, domain: str, params: Struct) -> None:
        """See Terms."""
        reference = getattr(params, "reference", "")
        if reference.startswith("oci:"):
            await trio.to_thread.run_sync(self._lending.note, domain, reference)


class UserTerms:
    """Of a daemon that is not root's: its workers have its uid, and end with it."""

    keeper: Keeper | None = None

    def __init__(self, layout: Layout, readable: Sequence[Place], lender: Lender) -> None:
        self._layout = layout
        self._readable = readable
        self.lent = lender.lent
        self.asked = lender.asked

    async def confinement(self, domain: str, owner: str) -> Confinement:
        """See Terms."""
        del owner
        run = self._layout.domain_run(domain).path
        os.makedirs(run, 0o700, exist_ok=True)
        return plan_user_sandbox(self._readable, self._layout.domain(domain).path, run)

    def started(self, domain: str, owner: str, pid: int) -> None:
        """See Terms."""

    async def ended(self, domain: str) -> None:
        """See Terms."""


class RootTerms:
    """Of root's daemon."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        owned: Owned,
        readable: Sequence[Place],
        lender: Lender,
        files: HostFiles,
        keeper: Keeper | None,
    ) -> None:
        self._config = config
        self._layout = layout
        self._owned = owned
        self._readable = readable
        self._files = files
        self.keeper = keeper
        self.lent = lender.lent
        self.asked = lender.asked
        self._range = parse_uid_range(config.uid_range)
        self._given: set[str] = set()
        """Domains whose directories were looked through."""
        self._lock = trio.Lock()

    async def confinement(self, domain: str, owner: str) -> Confinement:
        """See Terms."""
        async with self._lock:
            return await trio.to_thread.run_sync(self._plan, domain, owner)

    def started(self, domain: str, owner: str, pid: int) -> None:
        """See Terms."""
        settings = self._config.of_namespace(owner)
        self._files.keep(*self._etc(domain, settings))
        with suppress(NotFoundError):
            device = find_mount(self._layout.domain_run(domain).fuse).device
            limits = Limits()
            raise_background(int(device.partition(":")[2]), limits.max_background, limits.congestion_threshold)
        with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(_SPARED))

    async def ended(self, domain: str) -> None:
        """See Terms."""
        async with self._lock:
            await trio.to_thread.run_sync(self._forget, domain)

    def sweep(self) -> None:
        """Forget domains that have no directory any more. Blocks; for the daemon's start."""
        for domain in self._owned.uids():
            if not os.path.lexists(self._layout.domain(domain).path):
                self._owned.forget_domain(domain)

    def _plan(self, domain: str, owner: str) -> Confinement:
        settings = self._config.of_namespace(owner)
        check_settings(owner, settings)
        directory = self._layout.domain(domain).path
        uid = self._uid_of(domain)
        os.makedirs(directory, 0o700, exist_ok=True)
        if domain not in self._given or os.stat(directory).st_uid != uid:
            give_to(directory, uid)
            self._given.add(domain)
        os.makedirs(self._layout.stage, 0o700, exist_ok=True)
        etc, resolv_conf = self._etc(domain, settings)
        self._files.make(etc, resolv_conf)
        return plan_sandbox(
            self._readable,
            directory,
            uid=uid,
            etc=etc,
            stage=self._layout.stage,
            netns=settings.netns,
            cgroups=self._join(domain, settings),
        )

    def _uid_of(self, domain: str) -> int:
        """The domain's, given out now if it has none. One that its directory has already is kept, if it is free."""
        uids = self._owned.uids()
        if uids.get(domain, 0) in self._range:
            return uids[domain]
        found = owners(self._layout.domains)
        has = found.pop(escape_component(domain), 0)
        taken = {*uids.values(), *found.values()}
        uid = has if has in self._range and has not in taken else self._next_uid(taken)
        self._owned.put_uid(domain, uid)
        return uid

    def _next_uid(self, taken: set[int]) -> int:
        """One that no domain has, and nobody whom the host's name services know today."""
        while True:
            uid = plan_uid(self._range, taken, self._owned.latest_uid())
            if not _is_known(uid):
                return uid
            taken.add(uid)

    def _etc(self, domain: str, settings: Namespace) -> tuple[str, str]:
        """The directory that its worker sees as /etc, and the resolv.conf there; "" for the host's."""
        resolv_conf = resolv_conf_of(settings)
        return (self._layout.domain_run(domain).etc if resolv_conf else self._layout.etc), resolv_conf

    def _join(self, domain: str, settings: Namespace) -> tuple[str, ...]:
        return make_leaves(find_parents(settings.cgroup), _leaf(domain)) if settings.cgroup else ()

    def _forget(self, domain: str) -> None:
        for settings in self._config.namespace.values():
            if settings.cgroup:
                remove_leaves(settings.cgroup, _leaf(domain))
        self._given.discard(domain)
        self._files.forget(self._layout.domain_run(domain).etc)
        if not os.path.lexists(self._layout.domain(domain).path):
            self._owned.forget_domain(domain)


def _is_known(uid: int) -> bool:
    """Whether somebody has it, or a group has its number, in any database of nsswitch.conf(5)."""
    for look in (pwd.getpwuid, grp.getgrgid):
        with suppress(KeyError):
            look(uid)
            return True
    return False


def _leaf(domain: str) -> str:
    """What its cgroup is called."""
    return f"nsfs-{escape_component(domain)}"


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """Say which key of the configuration an error is about."""
    try:
        yield
    except NsfsError as error:
        raise type(error)(f"{key}: {error.message}", hint=error.hint) from None


def _check_netns(path: str) -> None:
    if not path:
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(
            f"no such network namespace: {path}", hint="ip netns list shows those of iproute2"
        ) from None
    except OSError as error:
        raise UsageError(f"no network namespace: {path}: {error.strerror}") from None
    try:
        if fcntl.ioctl(fd, _GET_NSTYPE) == _NETWORK:
            return
    except OSError:
        pass
    finally:
        os.close(fd)
    raise UsageError(f"no network namespace: {path}", hint="a file such as /run/netns/NAME or /proc/PID/ns/net")


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
