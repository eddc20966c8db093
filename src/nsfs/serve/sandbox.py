"""What a worker is held to, from before it reads the first byte of somebody else's until it ends.

Owns the value `Confinement`, the decision what is in it (`plan_sandbox`, pure), and the order in which `confine`
carries it out in a process that was just forked, has one thread, and still has its parent's rights: cgroups, network
namespace, a root of its own, no core dumps, its own uid without any capability, no_new_privs, Landlock, the filter of
system calls. Each step takes away what the next ones do not need; none can be taken back, and children have all of it.

Refuses to go on where a step fails: a worker that cannot be confined is not started. What a kernel does not have (see
`nsfs doctor`) is left out. Where the caller is not root, there is no own uid, root, network namespace or cgroup.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import sysconfig
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from nsfs.errors import NsfsError
from nsfs.serve import landlock, seccomp
from nsfs.store.resident import MOST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# include/uapi/linux: sched.h, mount.h, prctl.h, capability.h
_NEW_MOUNTS, _NEW_NETWORK = 0x00020000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 1 << 14, 1 << 18
_DETACH: Final = 2
_SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _AMBIENT_CLEAR = 4, 24, 38, 47, 4
_LAST_CAPABILITY: Final = 63
_PROC_OPTIONS: Final = "hidepid=2,subset=pid"
"""Its own processes and nothing else (proc(5), Linux 5.8; before, these options would change the host's /proc)."""
_TMPFS_OPTIONS: Final = "mode=755,size=256k,nr_inodes=512"

_LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_CERTIFICATES: Final = (
    "/etc/ssl/certs",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust/extracted",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
)
_ZONES: Final = "/usr/share/zoneinfo"
_NULL: Final = "/dev/null"
_LOCKED: Final = MOST + (1 << 20)
"""Bytes that it may have locked in memory: its index."""
_HOST_OF_USER: Final = ("/etc", "/usr", "/lib", "/lib64", "/proc", "/run/systemd/resolve", "/run/resolvconf")
"""What a user's worker may read beside Python; the user may read all of it anyway."""


class Place(Struct, frozen=True):
    """A file or directory that a confined process sees."""

    path: str
    """Under which name."""
    writable: bool = False
    source: str = ""
    """What is shown there; the same path if empty."""


class Confinement(Struct, frozen=True, kw_only=True):
    """What a process is held to."""

    places: tuple[Place, ...]
    """All that it may read, or write; what is not there is left out."""
    uid: int | None = None
    """Its uid and gid, with no other group; None: the caller's."""
    stage: str = ""
    """An empty directory on which a root of its own is put together; empty: the host's root."""
    netns: str = ""
    """Path of its network namespace; empty: the caller's."""
    cgroups: tuple[str, ...] = ()
    """Directories of the cgroups that it joins."""


def plan_readable(paths: Iterable[str], environ: Mapping[str, str]) -> tuple[Place, ...]:
    """What an interpreter with these module `paths` reads: modules, libraries, certificates, time zones. Pure."""
    modules = {path for path in paths if path.startswith("/")}
    named = {environ.get("SSL_CERT_DIR", ""), os.path.dirname(environ.get("SSL_CERT_FILE", ""))}
    given = {path for path in named if path.startswith("/")}
    wanted = sorted({*modules, *given, *_LIBRARIES, *_CERTIFICATES, _ZONES})
    return (*(Place(path) for path in wanted), Place(_NULL, writable=True))


def module_paths(path: Sequence[str], program: str) -> tuple[str, ...]:
    """Where this interpreter finds modules: its sys.path without the directory of `program`, and its own library."""
    standard = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    programs = {"", os.path.dirname(program), os.path.dirname(os.path.realpath(program))}
    return tuple(sorted({*path, *standard} - programs))


def plan_sandbox(
    readable: Sequence[Place],
    directory: str,
    *,
    uid: int,
    etc: str,
    stage: str,
    netns: str = "",
    cgroups: tuple[str, ...] = (),
) -> Confinement:
    """The confinement of root's worker with the domain's `directory`; `etc` is shown as its /etc. Pure."""
    places = (*readable, Place("/etc", source=etc), Place(directory, writable=True))
    return Confinement(places=places, uid=uid, stage=stage, netns=netns, cgroups=cgroups)


def plan_user_sandbox(readable: Sequence[Place], directory: str, run: str) -> Confinement:
    """The confinement of a user's worker, which listens for fronts in the directory `run`. Pure."""
    host = (Place(path) for path in _HOST_OF_USER)
    return Confinement(places=(*readable, *host, Place(directory, writable=True), Place(run, writable=True)))


def plan_front_sandbox(readable: Sequence[Place], directory: str) -> Confinement:
    """The confinement of the process of a user's mount, which reads the domain's `directory`. Pure."""
    return Confinement(places=(*readable, *(Place(path) for path in _HOST_OF_USER), Place(directory)))


_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def confine(confinement: Confinement) -> None:
    """Hold the calling process to it; raises NsfsError, after which the process is to end.

    The kernel forgets PR_SET_PDEATHSIG with the change of credentials: set it again.
    """
    try:
        _join(confinement)
        if confinement.stage:
            _take_root(confinement)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_locking()
        os.umask(0o077)
        if confinement.uid is not None:
            _become(confinement.uid)
        _prctl(_SET_DUMPABLE, 0)
        _prctl(_SET_NO_NEW_PRIVS, 1)
        landlock.restrict([(place.path, place.writable) for place in confinement.places])
        seccomp.deny_calls(_libc)
    except OSError as error:
        raise NsfsError(f"a worker cannot be confined: {error}") from error


def _limit_locking() -> None:
    """As much as an index takes, or what we may have ourselves."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (_LOCKED, _LOCKED))
        return
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))


def _join(confinement: Confinement) -> None:
    for directory in confinement.cgroups:
        with open(os.path.join(directory, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write("0")
    if confinement.netns:
        fd = os.open(confinement.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(fd, _NEW_NETWORK), f"setns {confinement.netns}")
        finally:
            os.close(fd)


def _take_root(confinement: Confinement) -> None:
    """Have a root directory that shows the places and nothing else."""
    stage = confinement.stage
    _check(_libc.unshare(_NEW_MOUNTS), "unshare")
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("nsfs-worker", stage, "tmpfs", _NOSUID | _NODEV | _NOEXEC, _TMPFS_OPTIONS)
    shown = [place for place in sorted(confinement.places, key=lambda place: place.path) if _show(stage, place)]
    for place in shown:
        _mount(None, stage + place.path, None, _REMOUNT | _BIND | _flags(stage + place.path, place))
    _show_processes(f"{stage}/proc")
    os.chdir(stage)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")  # pivot_root(2): the old root is now on top of the new one
    _check(_libc.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC)


def _show(stage: str, place: Place) -> bool:
    """Bind a place below `stage`; False where there is nothing."""
    source, target = place.source or place.path, stage + place.path
    try:
        is_directory = stat.S_ISDIR(os.stat(source).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    os.makedirs(target if is_directory else os.path.dirname(target), 0o755, exist_ok=True)
    if not is_directory:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    _mount(source, target, None, _BIND)
    return True


def _flags(target: str, place: Place) -> int:
    if stat.S_ISCHR(os.stat(target).st_mode):
        return _NOSUID | _NOEXEC
    return _NOSUID | _NODEV | (_NOEXEC if place.writable else _RDONLY)


def _show_processes(target: str) -> None:
    """Show /proc, where the kernel can show a part of it."""
    os.mkdir(target, 0o755)
    try:
        _mount("proc", target, "proc", _NOSUID | _NODEV | _NOEXEC, _PROC_OPTIONS)
    except OSError:
        os.rmdir(target)


def _become(uid: int) -> None:
    """Be `uid`, with the group of that number alone, and without any capability, now or after an execve."""
    for capability in range(_LAST_CAPABILITY + 1):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)  # EINVAL for what the kernel does not know
    _prctl(_CAP_AMBIENT, _AMBIENT_CLEAR)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    header = _CapabilityHeader(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    _check(_libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()), "capset")


def _prctl(option: int, argument: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0), f"prctl {option}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = (None if text is None else os.fsencode(text) for text in (source, target, kind))
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
