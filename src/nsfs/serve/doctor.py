"""What nsfs needs of a kernel and a host, tried for real where that is cheap and leaves no trace.

Owns: the table FEATURES, and one probe for each. Filesystems are tried as detached mounts (fsopen(2), fsmount(2), Linux
5.2), which no path ever shows and which end with their descriptors; /dev/fuse is opened, and the INIT request that a
new connection begins with is read and never answered; files are nameless (O_TMPFILE) or in a temporary directory. What
takes root is answered by the kernel's version for others. A probe that fails unexpectedly says so as its finding.

Blocking, one thread, some 50 ms.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import stat
import struct
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import Struct

from nsfs.format.erofs import render_erofs
from nsfs.model.layer import Kind, Node
from nsfs.serve import landlock, seccomp
from nsfs.serve.cgroups import plan_parents
from nsfs.serve.idmap import cloned, shift_owners, user_namespace
from nsfs.serve.mounts import OPEN_HINT, loop_device
from nsfs.serve.syscalls import FSCONFIG, FSMOUNT, FSOPEN, syscall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nsfs.serve.config import Config


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that a kernel or host has or lacks."""

    name: str
    since: str
    """The Linux release that brought it; empty for what is no matter of the kernel's release."""
    without: str
    """What is lost."""
    needed: bool = False
    """Nothing works without it."""
    who: str = ""
    """root or user where only these use it."""
    key: str = ""
    """The key in [kernel] that turns it off."""
    instead_of: str = ""
    """Used only where this feature is not."""
    part_of: str = ""
    """Used only where this feature is, too."""


FEATURES = (
    Feature("fuse", "2.6.14", "nothing works: absent bytes come through FUSE", needed=True),
    Feature("/dev/fuse", "", "nothing works: no FUSE connection", needed=True),
    Feature("libfuse", "", "nothing works: pyfuse3 needs libfuse 3.3", needed=True),
    Feature("fusermount3", "", "nothing works for users who are not root", who="user", needed=True),
    Feature("erofs", "5.16", "metadata and mmap go through FUSE trees, slower", who="root", key="erofs"),
    Feature(
        "erofs from files", "6.12", "views take a loop device each", who="root", key="file_backed", part_of="erofs"
    ),
    Feature(
        "erofs directio",
        "6.13",
        "every page is kept twice, and cold reads are slower",
        who="root",
        key="directio",
        part_of="erofs from files",
    ),
    Feature(
        "loop devices",
        "2.6",
        "no EROFS where it cannot be mounted from files",
        who="root",
        instead_of="erofs from files",
        part_of="erofs",
    ),
    Feature("overlayfs", "4.0", "layers are merged in the FUSE tree; no --rw", who="root"),
    Feature("overlay on a view, twice", "6.12", "no containers inside containers (docker in docker)", who="root"),
    Feature("trusted xattrs", "", "no --rw", who="root"),
    Feature("FUSE_NOTIFY_RESEND", "6.9", "reads that a killed worker had taken fail once", who="root", key="resend"),
    Feature("idmapped mounts", "5.19", "no containers in user namespaces without a copy", who="root", key="idmap"),
    Feature("user namespaces", "3.8", "no containers in user namespaces", who="root", key="idmap"),
    Feature("memfd", "3.17", "nothing works: presence bitmaps live there", needed=True),
    Feature("sparse 16 TiB file", "", "nothing works: the pool does not fit this filesystem", needed=True),
    Feature("punched holes", "2.6.38", "evicted content keeps its disk space"),
    Feature("seccomp", "3.5", "a worker that is taken over may call all of the kernel"),
    Feature("Landlock", "5.13", "a worker that is taken over is held by its uid and root alone"),
    Feature("network namespaces", "", "no namespace's worker has a network of its own", who="root"),
    Feature("cgroups", "", "no namespace's worker counts for a cgroup of its own", who="root"),
    Feature("shared run directory", "", "other mount namespaces do not see new mounts", who="root"),
    Feature("XDG_RUNTIME_DIR", "", "the socket lies in /tmp", who="user"),
    Feature("open files", "", "fewer than 4,096: many mounts at once fail"),
)
"""In the order in which they are shown; the README's table by kernel version is made of them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe saw; `present` is None where only root or a running daemon could tell."""

    present: bool | None
    detail: str = ""


class FeatureReport(Struct, frozen=True, kw_only=True):
    """One line of `nsfs doctor`."""

    name: str
    present: str
    """yes, no or unknown."""
    used: bool
    needed: bool
    since: str
    without: str
    detail: str


class DoctorReport(Struct, frozen=True, kw_only=True):
    """`nsfs doctor`."""

    kernel: str
    uid: int
    usable: bool
    missing: list[str]
    """Needed, and not there."""
    features: list[FeatureReport]


def judge(findings: Mapping[str, Finding], config: Config, kernel: str, uid: int) -> DoctorReport:
    """What `findings` mean for a daemon of `uid` that runs by `config`. Pure."""
    user = "root" if uid == 0 else "user"
    used: set[str] = set()
    rows: list[FeatureReport] = []
    for feature in FEATURES:
        finding = findings[feature.name]
        wanted = _is_wanted(feature, config, user) and feature.instead_of not in used
        wanted = wanted and (not feature.part_of or feature.part_of in used)
        if wanted and finding.present:
            used.add(feature.name)
        rows.append(_report(feature, finding, user, used=feature.name in used))
    missing = [row.name for row in rows if row.needed and row.present == "no"]
    return DoctorReport(kernel=kernel, uid=uid, usable=not missing, missing=missing, features=rows)


def _is_wanted(feature: Feature, config: Config, user: str) -> bool:
    return feature.who in {"", user} and (not feature.key or bool(getattr(config.kernel, feature.key)))


def _report(feature: Feature, finding: Finding, user: str, *, used: bool) -> FeatureReport:
    return FeatureReport(
        name=feature.name,
        present={True: "yes", False: "no", None: "unknown"}[finding.present],
        used=used,
        needed=feature.needed and feature.who in {"", user},
        since=feature.since,
        without=feature.without,
        detail=finding.detail,
    )


def parse_release(release: str) -> tuple[int, int]:
    """The first two numbers of `uname -r`; (0, 0) if there are none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def examine(config: Config, environ: Mapping[str, str], uid: int) -> DoctorReport:
    """Try everything on this host; raises nothing but bugs."""
    host = _Host(config, environ, uid, platform.release())
    findings = {feature.name: _find(PROBES[feature.name], host) for feature in FEATURES}
    return judge(findings, config, host.release, uid)


@dataclass(frozen=True, slots=True)
class _Host:
    config: Config
    environ: Mapping[str, str]
    uid: int
    release: str

    def by_version(self, since: str) -> Finding:
        """For those who may not try."""
        return Finding(parse_release(self.release) >= parse_release(since), f"by version; Linux {since}")

    @property
    def state(self) -> str:
        """The configured root, or the nearest directory above it that exists."""
        path = self.config.root
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        return path


def _find(probe: Callable[[_Host], Finding], host: _Host) -> Finding:
    try:
        return probe(host)
    except PermissionError as error:
        return Finding(present=None, detail=f"cannot be tried: {error.strerror}")
    except OSError as error:
        return Finding(present=False, detail=error.strerror or str(error))


_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_libc = ctypes.CDLL(None, use_errno=True)


def _keep(stack: ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _mount_detached(stack: ExitStack, kind: bytes, *flags: bytes, **options: str) -> str:
    """Mount where no path leads to, until `stack` closes; the path of its root by /proc."""
    context = _keep(stack, syscall(FSOPEN, kind, 1))
    for flag in flags:
        syscall(FSCONFIG, context, _SET_FLAG, flag, None, 0)
    for key, value in options.items():
        syscall(FSCONFIG, context, _SET_STRING, key.encode(), os.fsencode(value), 0)
    syscall(FSCONFIG, context, _CREATE, None, None, 0)
    return f"/proc/self/fd/{_keep(stack, syscall(FSMOUNT, context, 1, 0))}"


def _knows_filesystem(kind: bytes, since: str) -> Callable[[_Host], Finding]:
    def probe(host: _Host) -> Finding:
        if host.uid != 0:
            with open("/proc/filesystems", "rb") as file:
                known = b"\t" + kind + b"\n" in file.read()
            return Finding(present=True) if known else host.by_version(since)
        os.close(syscall(FSOPEN, kind, 1))
        return Finding(present=True)

    return probe


def _probe_device(_host: _Host) -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return Finding(present=False, detail=f"not yours to open; {OPEN_HINT}")
    return Finding(present=True)


def _probe_libfuse(_host: _Host) -> Finding:
    library = ctypes.CDLL("libfuse3.so.3")
    library.fuse_pkgversion.restype = ctypes.c_char_p
    version = library.fuse_pkgversion().decode()
    return Finding(parse_release(version) >= (3, 3), version)


def _probe_fusermount(_host: _Host) -> Finding:
    path = shutil.which("fusermount3")
    if path is None:
        return Finding(present=False, detail="not on PATH")
    setuid = os.stat(path).st_uid == 0 and bool(os.stat(path).st_mode & stat.S_ISUID)
    return Finding(setuid, path if setuid else f"not setuid root: {path}")


def _probe_erofs_option(option: bytes, since: str) -> Callable[[_Host], Finding]:
    def probe(host: _Host) -> Finding:
        if host.uid != 0:
            return host.by_version(since)
        context = syscall(FSOPEN, b"erofs", 1)
        try:
            syscall(FSCONFIG, context, _SET_FLAG, option, None, 0)
        finally:
            os.close(context)
        return Finding(present=True)

    return probe


def _write_view(stack: ExitStack, directory: str) -> tuple[str, str]:
    """The map of an empty layer and a disk for it, on the filesystem that will hold them."""
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="nsfs-doctor-", dir=directory))
    blocks = 1 << 20
    with open(f"{place}/map", "wb") as file:
        file.write(render_erofs(Node(Kind.DIRECTORY, 0o755), disk_blocks=blocks, uuid=bytes(16)))
    with open(f"{place}/disk", "wb") as file:
        file.truncate(blocks << 12)
    return f"{place}/map", f"{place}/disk"


def _mount_view(stack: ExitStack, directory: str) -> str:
    """Mount an empty layer from files."""
    image, disk = _write_view(stack, directory)
    return _mount_detached(stack, b"erofs", b"ro", source=image, device=disk)


def _mount_loop_view(stack: ExitStack, directory: str) -> str:
    """Mount an empty layer over loop devices."""
    image, disk = (stack.enter_context(loop_device(path)) for path in _write_view(stack, directory))
    return _mount_detached(stack, b"erofs", b"ro", source=image, device=disk)


def _probe_file_backed(host: _Host) -> Finding:
    if host.uid != 0:
        return host.by_version("6.12")
    with ExitStack() as stack:
        _mount_view(stack, host.state)
    return Finding(present=True, detail="tried")


def _probe_nesting(host: _Host) -> Finding:
    if host.uid != 0:
        return host.by_version("6.12")
    with ExitStack() as stack:
        try:
            view = _mount_view(stack, host.state)
        except OSError:
            return Finding(present=None, detail="views are over loop devices here")
        empty = stack.enter_context(tempfile.TemporaryDirectory(prefix="nsfs-doctor-", dir=host.state))
        for _ in range(2):
            view = _mount_detached(stack, b"overlay", b"ro", source="nsfs-doctor", lowerdir=f"{view}:{empty}")
    return Finding(present=True, detail="tried")


def _probe_loop(_host: _Host) -> Finding:
    os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
    return Finding(present=True)


def _probe_trusted_xattrs(host: _Host) -> Finding:
    if host.uid != 0:
        return Finding(present=None, detail="root's")
    descriptor = os.open(host.state, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.setxattr(descriptor, "trusted.overlay.nsfs", b"y")
    finally:
        os.close(descriptor)
    return Finding(present=True, detail=host.state)


_INIT_FLAGS = struct.Struct("<40xIIIII")
"""fuse_in_header, then major, minor, max_readahead, flags, flags2 (include/uapi/linux/fuse.h, 7.36 and later)."""
_HAS_RESEND = 1 << 39


def _probe_resend(host: _Host) -> Finding:
    """A new connection's INIT says what the kernel can; nobody answers it."""
    if host.uid != 0:
        return host.by_version("6.9")
    with ExitStack() as stack:
        device = _keep(stack, os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        options = {"fd": str(device), "rootmode": "40000", "user_id": "0", "group_id": "0"}
        _mount_detached(stack, b"fuse", source="nsfs-doctor", **options)
        _, minor, _, low, high = _INIT_FLAGS.unpack_from(os.read(device, 1 << 18).ljust(64, b"\0"))
    return Finding(bool((low | high << 32) & _HAS_RESEND), f"FUSE 7.{minor}")


def _probe_idmap(host: _Host) -> Finding:
    """A view, as layers that are shown on demand are, and a directory of `root`, as unpacked ones are."""
    if host.uid != 0:
        return host.by_version("5.19")
    by_one = "0 1 1\n"
    with ExitStack() as stack:
        namespace = stack.enter_context(user_namespace(by_one, by_one))
        try:
            view = _mount_view(stack, host.state)
        except OSError:
            view = _mount_loop_view(stack, host.state)
        shift_owners(view, namespace)
        stack.enter_context(cloned(host.state, namespace))
        return Finding(os.stat(view).st_uid == 1, "tried")


def _probe_userns(_host: _Host) -> Finding:
    if not os.path.exists("/proc/self/ns/user"):
        return Finding(present=False, detail="not in this kernel")
    with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:
        limit = int(file.read())
    return Finding(limit > 0, f"at most {limit}")


def _probe_memfd(_host: _Host) -> Finding:
    os.close(os.memfd_create("nsfs-doctor"))
    return Finding(present=True)


_DISK_SIZE = (16 << 40) - 4096
"""Of a pool's sparse file."""


def _probe_seccomp(_host: _Host) -> Finding:
    if platform.machine() not in seccomp.ARCHITECTURES:
        return Finding(present=False, detail=f"its numbers are not known here: {platform.machine()}")
    return Finding(os.path.exists("/proc/sys/kernel/seccomp/actions_avail"))


def _probe_landlock(_host: _Host) -> Finding:
    version = landlock.abi()
    return Finding(version > 0, f"ABI {version}" if version else "not in this kernel, or turned off")


def _probe_netns(_host: _Host) -> Finding:
    return Finding(os.path.exists("/proc/self/ns/net"))


def _probe_cgroups(_host: _Host) -> Finding:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        found = plan_parents(file.read(), "")
    return Finding(bool(found), ", ".join(found))


def _probe_sparse(host: _Host) -> Finding:
    descriptor = os.open(host.state, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, _DISK_SIZE)
        os.pwrite(descriptor, b"x", _DISK_SIZE - 1)
        sparse = os.fstat(descriptor).st_blocks * 512 < 1 << 20
    finally:
        os.close(descriptor)
    return Finding(sparse, host.state)


_KEEP_SIZE_PUNCH_HOLE = 3


def _probe_punch(host: _Host) -> Finding:
    descriptor = os.open(host.state, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, b"x" * 8192, 0)
        offset, length = ctypes.c_int64(0), ctypes.c_int64(8192)
        if _libc.fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, offset, length) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(descriptor)
    return Finding(present=True, detail=host.state)


def is_shared(mountinfo: str, path: str) -> bool:
    """Whether the mount that `path` lies on passes new mounts on (proc(5), mountinfo). Pure."""
    best, shared = "", False
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        point = fields[4].encode("latin-1", "replace").decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, shared = point, any(field.startswith("shared:") for field in fields[6 : fields.index("-")])
    return shared


def _probe_shared(host: _Host) -> Finding:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        shared = is_shared(file.read(), host.config.run)
    return Finding(shared, host.config.run)


def _probe_xdg(host: _Host) -> Finding:
    path = host.environ.get("XDG_RUNTIME_DIR", "")
    if not path:
        return Finding(present=False, detail="not set")
    status = os.stat(path)
    mine = status.st_uid == host.uid and not status.st_mode & 0o077
    return Finding(mine, path if mine else f"not yours alone: {path}")


def _probe_files(_host: _Host) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(hard >= 4096 or hard == resource.RLIM_INFINITY, f"{soft}, may be raised to {hard}")


PROBES: dict[str, Callable[[_Host], Finding]] = {
    "fuse": _knows_filesystem(b"fuse", "2.6.14"),
    "/dev/fuse": _probe_device,
    "libfuse": _probe_libfuse,
    "fusermount3": _probe_fusermount,
    "erofs": _knows_filesystem(b"erofs", "5.16"),
    "erofs from files": _probe_file_backed,
    "erofs directio": _probe_erofs_option(b"directio", "6.13"),
    "loop devices": _probe_loop,
    "overlayfs": _knows_filesystem(b"overlay", "4.0"),
    "overlay on a view, twice": _probe_nesting,
    "trusted xattrs": _probe_trusted_xattrs,
    "FUSE_NOTIFY_RESEND": _probe_resend,
    "idmapped mounts": _probe_idmap,
    "user namespaces": _probe_userns,
    "memfd": _probe_memfd,
    "sparse 16 TiB file": _probe_sparse,
    "punched holes": _probe_punch,
    "seccomp": _probe_seccomp,
    "Landlock": _probe_landlock,
    "network namespaces": _probe_netns,
    "cgroups": _probe_cgroups,
    "shared run directory": _probe_shared,
    "XDG_RUNTIME_DIR": _probe_xdg,
    "open files": _probe_files,
}
