"""Mounting: the system calls, what the kernel shows of mounts, and a way to call it that can be given up.

Owns mount(2), umount2(2), loop devices, fusermount3, /sys/class/bdi, and the words in which their errors
are told. Steps are plain data; `run_mounts` does them in a process forked for it, so that `carry_out` can kill it at a
deadline: mounting a view reads it through FUSE, and whatever reads through FUSE may wait for ever.

Everything is mounted read-only except an overlay with an upper directory. Views and overlays keep set-user-ID bits and
device nodes working, since root filesystems of containers need them, as containerd's overlay snapshots do; what a user
mounts by hand gets `nosuid` and `nodev` by the flag `guarded`.

Concurrency: the functions block and keep no state. Nothing here looks at a path below a mount.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, TypeAlias

import msgspec
import trio
from msgspec import Struct

from nsfs.errors import (
    ERRORS,
    BusyError,
    DeniedError,
    NotFoundError,
    NsfsError,
    UnreachableError,
    UnsupportedError,
    UsageError,
)
from nsfs.model.mounts import OVERLAY_OPTIONS
from nsfs.serve.idmap import attach, cloned, user_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nsfs.serve.forkclient import Child, ForkServer

FUSE_TYPE: Final = "fuse.nsfs"
MAX_OPTIONS: Final = 4095
"""Bytes of mount(2)'s last argument: a page with its terminator."""

# include/uapi/linux/mount.h, include/linux/fs.h
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _PRIVATE = 1, 2, 4, 32, 4096, 1 << 18
_FORCE, _DETACH, _NOFOLLOW = 1, 2, 8
# include/uapi/linux/loop.h
_LOOP_CONFIGURE, _LOOP_GET_FREE = 0x4C0A, 0x4C82
_LOOP_READ_ONLY, _LOOP_AUTOCLEAR, _LOOP_DIRECT_IO = 1, 4, 16
_LOOP_CONFIG: Final = struct.Struct("<II 52xI 176x 64x")
"""struct loop_config: fd, block_size; struct loop_info64, of which lo_flags alone is set; reserved."""
_LOOP_ATTEMPTS: Final = 16

_libc = ctypes.CDLL(None, use_errno=True)


# Steps


class Fuse(Struct, frozen=True, kw_only=True, tag="fuse"):
    """A FUSE filesystem over descriptor number `fd` of those given to `carry_out` (or of this process)."""

    target: str
    fd: int
    allow_other: bool = True
    read_ahead_kb: int | None = None


class Erofs(Struct, frozen=True, kw_only=True, tag="erofs"):
    """A view: metadata from the file `image`, contents from the file `device`.

    Without `loop` the kernel reads both as files (Linux 6.12); `direct` keeps one copy of each page less in memory.
    """

    target: str
    image: str
    device: str
    direct: bool = True
    loop: bool = False
    read_ahead_kb: int | None = None


class Overlay(Struct, frozen=True, kw_only=True, tag="overlay"):
    """`lowers`, top first, are names relative to the directory `base`; read-only without `upper` and `work`.

    Relative names keep the options of 128 lowers below a page on every kernel. Without an upper directory two lowers
    are the least that overlayfs takes.
    """

    target: str
    base: str
    lowers: tuple[str, ...]
    upper: str | None = None
    work: str | None = None
    guarded: bool = False


class Bind(Struct, frozen=True, kw_only=True, tag="bind"):
    """What is mounted at `source`, read-only, at `target` too."""

    target: str
    source: str
    guarded: bool = False


class Clones(Struct, frozen=True, kw_only=True, tag="clones"):
    """Directories shown a second time, read-only, with the owners that `uids` and `gids` (as in uid_map) make of them.

    `clones` are pairs of a directory and its name below `target`.
    """

    target: str
    clones: tuple[tuple[str, str], ...]
    uids: str
    gids: str


class Umount(Struct, frozen=True, kw_only=True, tag="umount"):
    """Take a mount away; `detach` at once, though it is in use. It is no error if there is none."""

    target: str
    detach: bool = False


Step: TypeAlias = Fuse | Erofs | Overlay | Bind | Clones | Umount


class MountPlan(Struct, frozen=True):
    """Steps in their order; the first that fails is the last."""

    steps: tuple[Step, ...]


class StepResult(Struct, frozen=True, kw_only=True):
    """How a step went; `code` is empty if well, else a key of `nsfs.errors.ERRORS`."""

    seconds: float
    read_ahead_of: tuple[str, ...] = ()
    """Whose read-ahead it set: names in /sys/class/bdi, of an EROFS mount."""
    code: str = ""
    message: str = ""
    hint: str | None = None


def do_step(step: Step) -> tuple[str, ...]:
    """Do one step here and now; may block for as long as a read of a view may. Gives StepResult.read_ahead_of."""
    match step:
        case Fuse():
            mount_fuse(step.target, step.fd, allow_other=step.allow_other)
            if step.read_ahead_kb is not None:
                set_read_ahead(find_mount(step.target).device, step.read_ahead_kb)
        case Erofs():
            return mount_erofs(step)
        case Overlay():
            mount_overlay(step)
        case Bind():
            mount_bind(step)
        case Clones():
            mount_clones(step)
        case Umount():
            unmount(step.target, detach=step.detach)
    return ()


def run_mounts(args: bytes, fds: list[int]) -> int:
    """Entry point for a fork server: do a MountPlan, write the list of StepResults to the first descriptor."""
    results: list[StepResult] = []
    for step in msgspec.msgpack.decode(args, type=MountPlan).steps:
        if isinstance(step, Fuse):
            step = msgspec.structs.replace(step, fd=fds[1 + step.fd])  # noqa: PLW2901 - the same step as seen here
        begin = time.monotonic()
        try:
            names = do_step(step)
        except NsfsError as error:
            seconds = time.monotonic() - begin
            results.append(StepResult(seconds=seconds, code=error.code, message=error.message, hint=error.hint))
            break
        results.append(StepResult(seconds=time.monotonic() - begin, read_ahead_of=names))
    os.write(fds[0], msgspec.msgpack.encode(results))
    os.close(fds[0])  # who reads it need not wait until we are gone
    return 0


async def carry_out(
    server: ForkServer, plan: MountPlan, fds: Sequence[int] = (), *, deadline: float
) -> list[StepResult]:
    """Do `plan` in a process of its own, killed after `deadline` seconds.

    Raises the error of the step that failed; steps before it stay done. Raises UnreachableError at the deadline, when
    it is not known how far it got: unmount with `detach` what it may have mounted.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    async with trio.lowlevel.FdStream(read) as told:
        with trio.move_on_after(deadline), ExitStack() as ours:
            ours.callback(os.close, write)
            async with server.running("nsfs.serve.mounts:run_mounts", plan, [write, *fds]) as child:
                ours.close()
                data = b"".join([bytes(piece) async for piece in told])
                return _parse_results(data) if data else await _fail_as(child)
    raise UnreachableError(
        f"mounting took longer than {deadline:g} s: {plan.steps[-1].target}",
        hint="the image's registry may be unreachable: see nsfs status",
    )


async def _fail_as(child: Child) -> NoReturn:
    raise NsfsError(f"the mounting process ended without a word: exit status {await child.wait()}")


def _parse_results(data: bytes) -> list[StepResult]:
    results = msgspec.msgpack.decode(data, type=list[StepResult])
    if results and results[-1].code:
        raise ERRORS.get(results[-1].code, NsfsError)(results[-1].message, hint=results[-1].hint)
    return results


# System calls


def mount_fuse(target: str, fd: int, *, allow_other: bool = True) -> None:
    """Mount the connection of `fd`, an open /dev/fuse; root only. Permissions are the kernel's to check."""
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    _mount("nsfs", target, FUSE_TYPE, _RDONLY | _NOSUID | _NODEV, options + ",allow_other" * allow_other)


def mount_fuse_as_user(target: str) -> int:
    """Mount a FUSE filesystem at `target` by the set-uid fusermount3, for a user who is not root; gives its /dev/fuse.

    `fusermount3` mounts for the calling user alone, read-only, nosuid and nodev. Raises NsfsError with what it says.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = "ro,nosuid,nodev,default_permissions,fsname=nsfs,subtype=nsfs"
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        _run_fusermount(["-o", options, "--", target], environment, [theirs.fileno()])
        ours.settimeout(5)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise UnsupportedError(f"fusermount3 gave no descriptor: {target}")
    return fds[0]


def unmount_as_user(target: str, *, detach: bool = False) -> None:
    """Take away what `mount_fuse_as_user` mounted."""
    _run_fusermount(["-u", *(["-z"] if detach else []), "--", target], dict(os.environ), [])


def mount_erofs(step: Erofs) -> tuple[str, ...]:
    """Mount a view with mount(2); over loop devices, if asked, which vanish with it. Gives its names as a bdi.

    Nothing tells which of two that appear at a time is the mount's: then the names of both.
    """
    before = _bdi_names()
    with ExitStack() as stack:
        image, device, extra = step.image, step.device, ",directio" if step.direct and not step.loop else ""
        loops: list[str] = []
        if step.loop:
            loops = [stack.enter_context(loop_device(path, direct=step.direct)) for path in (image, device)]
            image, device = loops
        _refuse_comma(device)
        _mount(image, step.target, "erofs", _RDONLY, f"device={device}{extra}")
        names = [f"7:{loop.removeprefix('/dev/loop')}" for loop in loops] or sorted(_bdi_names() - before)
        if step.read_ahead_kb is not None:
            for name in names:
                set_read_ahead(name, step.read_ahead_kb)
        return tuple(names)


def mount_overlay(step: Overlay) -> None:
    """Stack directories. Changes the working directory for a moment, so call it where nobody else depends on that."""
    options = plan_overlay_options(step)
    flags = _NOSUID | _NODEV if step.guarded else 0
    if step.upper is None:
        flags |= _RDONLY
    with _working_directory(step.base):
        _mount("overlay", os.path.abspath(step.target), "overlay", flags, options)


def mount_bind(step: Bind) -> None:
    """Show a mount a second time, read-only."""
    _mount(step.source, step.target, None, _BIND, None)
    try:
        flags = _RDONLY | (_NOSUID | _NODEV if step.guarded else 0)
        _mount(None, step.target, None, _BIND | _REMOUNT | flags, None)
    except NsfsError:
        unmount(step.target, detach=True)
        raise


def mount_clones(step: Clones) -> None:
    """Show directories with shifted owners, by idmapped mounts (Linux 5.12); all of them by one user namespace."""
    try:
        with user_namespace(step.uids, step.gids) as namespace:
            for source, name in step.clones:
                with cloned(source, namespace) as tree:
                    attach(tree, os.path.join(step.target, name))
    except OSError as error:
        hint = "see idmapped mounts and user namespaces in nsfs doctor"
        raise UnsupportedError(f"cannot shift owners below {step.target}: {error.strerror}", hint=hint) from error


def unmount(target: str, *, detach: bool = False, force: bool = False) -> None:
    """Unmount `target`, which may not be a symlink; nothing happens if nothing is mounted there.

    `detach` hides it at once and unmounts when its last user is gone; `force` aborts requests that wait (FUSE alone).
    """
    flags = _NOFOLLOW | (_DETACH if detach else 0) | (_FORCE if force else 0)
    if _libc.umount2(os.fsencode(target), flags) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EINVAL:
        return
    raise plan_error(number, f"cannot unmount: {target}", "")


def plan_overlay_options(step: Overlay) -> str:
    """The options of an overlay mount; raises UsageError if they do not fit a page."""
    parts = ["lowerdir=" + ":".join(_escape(name, ":") for name in step.lowers)]
    if step.upper is not None:
        parts += [f"upperdir={_escape(step.upper)}", f"workdir={_escape(step.work or '')}"]
    options = ",".join((*parts, *OVERLAY_OPTIONS))
    if len(os.fsencode(options)) > MAX_OPTIONS:
        raise UsageError(f"too many layers for one mount: {len(step.lowers)}", hint="squash some of them")
    return options


_HINTS: Final = {
    (errno.ENOTBLK, "erofs"): "this kernel mounts erofs from block devices alone: use the driver erofs-loop",
    (errno.EINVAL, "erofs"): "the kernel's log says what it does not like; the driver fuse needs no erofs",
    (errno.ENODEV, "erofs"): "this kernel has no erofs: modprobe erofs, or use the driver fuse",
    (errno.ENODEV, "overlay"): "this kernel has no overlayfs: modprobe overlay",
    (errno.EINVAL, "overlay"): "the kernel's log says which directory it does not like",
    (errno.ELOOP, "overlay"): "a directory is stacked twice, or too deep a stack: only two filesystems may be stacked",
    (errno.ENODEV, FUSE_TYPE): "this kernel has no fuse: modprobe fuse",
}
OPEN_HINT: Final = "as root: chmod 666 /dev/fuse, as udev sets it up"
_ANY_HINTS: Final = {
    errno.EPERM: "mounting needs CAP_SYS_ADMIN in the host's user namespace",
    errno.EBUSY: "a process works below it: see fuser -m, or unmount with --force",
    errno.EIO: "the bytes could not be read: see nsfs status",
}
_CLASSES: Final[dict[int, type[NsfsError]]] = {
    errno.EPERM: DeniedError,
    errno.EACCES: DeniedError,
    errno.ENOENT: NotFoundError,
    errno.ENOTDIR: NotFoundError,
    errno.EBUSY: BusyError,
    errno.ENODEV: UnsupportedError,
    errno.ENOTBLK: UnsupportedError,
    errno.EIO: UnreachableError,
}


def plan_error(number: int, what: str, fstype: str) -> NsfsError:
    """How errno `number` of a mount of `fstype` is told."""
    hint = _HINTS.get((number, fstype), _ANY_HINTS.get(number))
    return _CLASSES.get(number, NsfsError)(f"{what}: {os.strerror(number).lower()}", hint=hint)


def _mount(source: str | None, target: str, fstype: str | None, flags: int, options: str | None) -> None:
    result = _libc.mount(
        source and os.fsencode(source),
        os.fsencode(target),
        fstype and fstype.encode(),
        ctypes.c_ulong(flags),
        options and os.fsencode(options),
    )
    if result != 0:
        raise plan_error(ctypes.get_errno(), f"cannot mount {fstype or 'bind'} at {target}", fstype or "bind")


def _escape(name: str, more: str = "") -> str:
    """`name` for overlayfs's options (Linux fs/overlayfs/params.c, ovl_unescape)."""
    return "".join(f"\\{char}" if char in "\\," + more else char for char in name)


def _refuse_comma(path: str) -> None:
    if "," in path:
        raise UsageError(f"a path with a comma cannot be an option of a mount: {path}")


@contextmanager
def _working_directory(path: str) -> Iterator[None]:
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(path)
        yield
    except OSError as error:
        raise plan_error(error.errno or errno.EIO, f"cannot enter {path}", "") from error
    finally:
        os.fchdir(here)
        os.close(here)


def _run_fusermount(arguments: list[str], environment: dict[str, str], fds: list[int]) -> None:
    try:
        done = subprocess.run(
            ["fusermount3", *arguments],
            env=environment,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise UnsupportedError("there is no fusermount3", hint="install the package fuse3") from None
    if done.returncode != 0:
        raise plan_fusermount_error(done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}")


def plan_fusermount_error(said: str) -> NsfsError:
    """How a refusal of fusermount3, which speaks English whatever the locale, is told."""
    said = said.removeprefix("fusermount3: ")
    if said.endswith(os.strerror(errno.EBUSY)):
        return BusyError(f"fusermount3 refused: {said}", hint=_ANY_HINTS[errno.EBUSY])
    return DeniedError(f"fusermount3 refused: {said}")


def check_fuse_as_user() -> None:
    """Raise, with what to do about it, where a user who is not root cannot mount at all."""
    if shutil.which("fusermount3") is None:
        raise UnsupportedError("there is no fusermount3", hint="install the package fuse3")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        raise DeniedError("/dev/fuse is not yours to open", hint=OPEN_HINT) from None
    except OSError as error:
        hint = "as root: modprobe fuse; a container needs the device from outside"
        raise UnsupportedError(f"there is no /dev/fuse: {error.strerror}", hint=hint) from None


# Loop devices


@contextmanager
def loop_device(path: str, *, direct: bool = True) -> Iterator[str]:
    """A read-only loop device over the file `path`; it goes with its last user, the context or a mount."""
    with ExitStack() as stack:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            device, name = _configure_loop(file, direct=direct)
            stack.callback(os.close, device)
        except OSError as error:
            raise plan_error(error.errno or errno.EIO, f"cannot make a loop device for {path}", "loop") from error
        yield name


def loop_file(device: str) -> str:
    """The file behind the loop device `device`; empty if there is none."""
    try:
        with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _configure_loop(file: int, *, direct: bool) -> tuple[int, str]:
    flags = _LOOP_READ_ONLY | _LOOP_AUTOCLEAR | (_LOOP_DIRECT_IO if direct else 0)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_GET_FREE)}"
            device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, 4096, flags))
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device, name
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


# What the kernel shows


class MountInfo(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5)); paths are decoded."""

    id: int
    parent: int
    device: str
    """major:minor, as /sys/class/bdi names it."""
    root: str
    target: str
    options: str
    fstype: str
    source: str
    super_options: str

    @property
    def is_idmapped(self) -> bool:
        """Whether it shows shifted owners."""
        return "idmapped" in self.options.split(",")

    @property
    def connection(self) -> int:
        """The number of a FUSE mount's connection in fusectl: its device's minor (and major, if there were one)."""
        major, _, minor = self.device.partition(":")
        return int(major) << 20 | int(minor)


def parse_mountinfo(text: str) -> list[MountInfo]:
    """Every mount, in the kernel's order: what is mounted later on one target comes later."""
    return [_parse_line(line) for line in text.splitlines()]


def _parse_line(line: str) -> MountInfo:
    before, _, after = line.partition(" - ")
    number, parent, device, root, target, options, *_ = before.split(" ", 6)
    fstype, source, super_options = after.split(" ", 2)
    return MountInfo(
        int(number),
        int(parent),
        device,
        _unescape(root),
        _unescape(target),
        options,
        fstype,
        _unescape(source),
        super_options,
    )


def _escape_octal(text: str) -> str:
    """As the kernel writes a path (Linux fs/proc_namespace.c, show_mountinfo)."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in text)


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks and backslashes (Linux fs/proc_namespace.c)."""
    if "\\" not in text:
        return text
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def load_mounts() -> list[MountInfo]:
    """The mounts of this process's namespace."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def find_mount(target: str) -> MountInfo:
    """What is mounted on top at `target`; raises NotFoundError. Asks no filesystem, and takes no other line apart."""
    wanted = _escape_octal(target)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        found = [_parse_line(line.rstrip("\n")) for line in file if line.split(" ", 5)[4] == wanted]
    if not found:
        raise NotFoundError(f"nothing is mounted here: {target}")
    return found[-1]


def _bdi_names() -> set[str]:
    with suppress(FileNotFoundError):
        return {name for name in os.listdir("/sys/class/bdi") if name.startswith("erofs-")}
    return set()


def set_read_ahead(bdi: str, kib: int) -> None:
    """Let sequential reads of a filesystem run `kib` KiB ahead; `bdi` is its name in /sys/class/bdi.

    That is major:minor for FUSE and for block devices, `erofs-<n>` for EROFS without one. Best effort: the mount works
    without it.
    """
    with suppress(OSError), open(f"/sys/class/bdi/{bdi}/read_ahead_kb", "w", encoding="ascii") as file:
        file.write(str(kib))
