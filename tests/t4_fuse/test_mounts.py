"""mount(2) in every shape, on the real kernel; and everything that only reads what the kernel says."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from mounting import arena, below, loops, make_directory
from nodes import wait_until
from nsfs.errors import BusyError, DeniedError, NotFoundError, NsfsError, UnreachableError, UnsupportedError, UsageError
from nsfs.format.erofs import render_erofs
from nsfs.model.layer import Kind, Node
from nsfs.model.mounts import Driver, Host, Lower
from nsfs.serve import mounts
from nsfs.serve.forkclient import ForkServer, launch_server, open_fork_server
from nsfs.serve.kernel import HostKernel
from nsfs.store.layout import Layout

__all__ = ["arena"]
ADDRESS = 1 << 30
CONTENT = b"content of a file on the disk\n" * 500


def with_server(body: Callable[[ForkServer], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            async with open_fork_server(launch_server(["nsfs.serve.mounts"])) as server:
                await body(server)

    trio.run(limited)


def view_files(top: Path) -> tuple[Path, Path]:
    """A map with one file, and a disk that has its content."""
    file = Node(Kind.REGULAR, 0o644)
    file.address, file.size = ADDRESS, len(CONTENT)
    root = Node(Kind.DIRECTORY, 0o755)
    root.children = {b"file": file, b"setuid": Node(Kind.REGULAR, 0o4755)}
    image, disk = top / "map.erofs", top / "disk"
    image.write_bytes(render_erofs(root, disk_blocks=(1 << 32) - 1, uuid=bytes(16)))
    with disk.open("wb") as out:
        out.truncate((16 << 40) - 4096)
        os.pwrite(out.fileno(), CONTENT, ADDRESS)
    return image, disk


def read_aheads(names: Sequence[str]) -> list[str]:
    """In KiB, as the kernel shows them: of a mount, and of what others mounted at the same time."""
    files = [Path("/sys/class/bdi") / name / "read_ahead_kb" for name in names]
    return [file.read_text() for file in files if file.exists()]


def mount_apart(step: mounts.Erofs) -> tuple[str, ...]:
    """Mount it while nobody else mounts: who does at the same moment may take its names for their own."""
    for _ in range(20):
        names = mounts.do_step(step)
        time.sleep(0.05)
        if f"{step.read_ahead_kb}\n" in read_aheads(names):
            return names
        mounts.unmount(step.target)
    raise AssertionError(f"its read-ahead is not {step.read_ahead_kb} KiB")


@pytest.mark.parametrize("loop", [False, True], ids=["file", "loop"])
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_view_mounts_and_goes_without_a_trace(arena: Path, loop: bool, direct: bool) -> None:
    image, disk = view_files(arena)
    target = make_directory(arena / "view")
    step = mounts.Erofs(
        target=str(target), image=str(image), device=str(disk), loop=loop, direct=direct, read_ahead_kb=1028
    )
    mount_apart(step)
    assert (target / "file").read_bytes() == CONTENT
    assert len(loops(arena)) == 2 * loop
    assert "ro" in mounts.find_mount(str(target)).options.split(",")
    mounts.unmount(str(target))
    deadline = time.monotonic() + 30
    while loops(arena) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loops(arena) == []
    with pytest.raises(NotFoundError):
        mounts.find_mount(str(target))


def test_errors_of_erofs_say_what_to_do(arena: Path) -> None:
    image, disk = view_files(arena)
    target = str(make_directory(arena / "view"))
    with pytest.raises(NotFoundError):
        mounts.mount_erofs(mounts.Erofs(target=target, image=str(image), device=str(arena / "none")))
    with pytest.raises(UsageError, match="comma"):
        mounts.mount_erofs(mounts.Erofs(target=target, image=str(image), device=f"{disk},x"))
    with pytest.raises(NotFoundError):
        mounts.mount_erofs(mounts.Erofs(target=target, image=str(image), device=str(arena / "none"), loop=True))
    tmpfs = make_directory(arena / "tmpfs")
    mounts._mount("tmpfs", str(tmpfs), "tmpfs", 0, None)
    (tmpfs / "map").write_bytes(image.read_bytes())
    with pytest.raises(UnsupportedError) as caught:
        mounts.mount_erofs(mounts.Erofs(target=target, image=str(tmpfs / "map"), device=str(disk)))
    assert caught.value.hint is not None
    assert "erofs-loop" in caught.value.hint
    assert loops(arena) == []


def lower_directories(base: Path, count: int) -> tuple[str, ...]:
    names = tuple(f"{1234567 + i}" for i in range(count))
    for i, name in enumerate(names):
        make_directory(base / name)
        (base / name / "who").write_text(name)
        (base / name / f"only{i}").touch()
    return names


def test_128_lowers_fit_however_long_the_directory_is_called(arena: Path) -> None:
    base = arena / ("long" * 50) / "l"
    names = lower_directories(base, 128)
    target = make_directory(arena / "root")
    here = os.getcwd()
    mounts.do_step(mounts.Overlay(target=str(target), base=str(base), lowers=names, guarded=True))
    assert os.getcwd() == here
    assert (target / "who").read_text() == names[0]
    assert len(list(target.iterdir())) == 129
    found = mounts.find_mount(str(target))
    assert {"ro", "nosuid", "nodev"} <= set(found.options.split(","))
    assert "redirect_dir=nofollow" in found.super_options


def test_an_upper_directory_makes_it_writable_even_with_odd_characters(arena: Path) -> None:
    names = lower_directories(arena / "l", 1)
    target, upper, work = (make_directory(arena / name) for name in ("root", "up,per:\\x", "wo,rk"))
    step = mounts.Overlay(
        target=str(target), base=str(arena / "l"), lowers=names, upper=str(upper), work=str(work), guarded=False
    )
    mounts.do_step(step)
    (target / "new").write_text("x")
    assert (upper / "new").read_text() == "x"
    assert "nosuid" not in mounts.find_mount(str(target)).options


def test_too_many_layers_are_refused_before_the_kernel_is_asked() -> None:
    step = mounts.Overlay(target="/t", base="/b", lowers=tuple(str(10_000_000 + i) for i in range(600)))
    with pytest.raises(UsageError, match="too many layers for one mount: 600"):
        mounts.plan_overlay_options(step)


def test_a_bind_is_read_only_and_guarded(arena: Path) -> None:
    source, target = make_directory(arena / "source"), make_directory(arena / "target")
    (source / "x").touch()
    mounts.do_step(mounts.Bind(target=str(target), source=str(source), guarded=True))
    assert (target / "x").exists()
    assert {"ro", "nosuid", "nodev"} <= set(mounts.find_mount(str(target)).options.split(","))
    with pytest.raises(OSError, match="Read-only"):
        (target / "y").touch()
    assert (source / "x").exists()


def test_unmounting(arena: Path) -> None:
    source, target = make_directory(arena / "source"), make_directory(arena / "target")
    mounts.unmount(str(target))
    with pytest.raises(NotFoundError):
        mounts.unmount(str(arena / "none"))
    mounts.do_step(mounts.Bind(target=str(target), source=str(source)))
    fd = os.open(target, os.O_RDONLY)
    try:
        with pytest.raises(BusyError, match="busy") as caught:
            mounts.unmount(str(target))
        assert caught.value.hint is not None
        mounts.do_step(mounts.Umount(target=str(target), detach=True))
    finally:
        os.close(fd)
    assert below(arena) == []


def test_a_plan_runs_in_a_process_of_its_own_and_tells_what_failed(arena: Path) -> None:
    image, disk = view_files(arena)
    names = lower_directories(arena / "l", 1)
    view, root = make_directory(arena / "l" / "7"), make_directory(arena / "root")
    erofs = mounts.Erofs(target=str(view), image=str(image), device=str(disk))
    overlay = mounts.Overlay(target=str(root), base=str(arena / "l"), lowers=("7", *names))
    missing = mounts.Bind(target=str(arena / "none"), source=str(root))

    async def body(server: ForkServer) -> None:
        results = await mounts.carry_out(server, mounts.MountPlan((erofs, overlay)), deadline=10)
        print([f"{result.seconds * 1e3:.2f} ms" for result in results])
        assert len(results) == 2
        assert (root / "file").read_bytes() == CONTENT
        assert stat.S_IMODE((root / "setuid").stat().st_mode) == 0o4755
        with pytest.raises(NotFoundError, match="cannot mount bind at"):
            await mounts.carry_out(server, mounts.MountPlan((missing, overlay)), deadline=10)
        await mounts.carry_out(
            server, mounts.MountPlan((mounts.Umount(target=str(root)), mounts.Umount(target=str(view)))), deadline=10
        )

    with_server(body)
    assert below(arena) == []


def test_a_mount_that_hangs_is_given_up(arena: Path) -> None:
    """Nobody serves the FUSE filesystem that the image would be read from."""
    target = make_directory(arena / "mnt")
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    step = mounts.Erofs(target=str(arena / "view"), image=f"{target}/maps/x", device=f"{target}/disks/x")
    make_directory(arena / "view")

    async def body(server: ForkServer) -> None:
        connection = mounts.Fuse(target=str(target), fd=0, read_ahead_kb=512)
        await mounts.carry_out(server, mounts.MountPlan((connection,)), [fuse], deadline=10)
        begin = time.monotonic()
        with pytest.raises(UnreachableError, match=r"longer than 0.3 s: .*/view"):
            await mounts.carry_out(server, mounts.MountPlan((step,)), deadline=0.3)
        assert time.monotonic() - begin < 15
        while server.children:  # noqa: ASYNC110 - the server offers no event for it
            await trio.sleep(0.01)

    try:
        with_server(body)
        assert mounts.find_mount(str(target)).fstype == "fuse.nsfs"
    finally:
        os.close(fuse)


AS_USER = """
import os, sys
from mounting import become_user
from nsfs.errors import NsfsError
from nsfs.serve import mounts
target = sys.argv[1]
become_user(65534, target)
fd = mounts.mount_fuse_as_user(target)
found = mounts.find_mount(target)
assert found.fstype == "fuse.nsfs", found
assert {"ro", "nosuid", "nodev"} <= set(found.options.split(",")), found
os.close(fd)
mounts.unmount_as_user(target)
try:
    mounts.mount_fuse_as_user("/")
except NsfsError as error:
    print(type(error).__name__, error.message)
"""


def test_a_user_mounts_by_fusermount3(arena: Path) -> None:
    target = make_directory(arena / "mnt")
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, target],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DeniedError fusermount3 refused: ")


def test_mountinfo_is_parsed() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
        "42 27 0:39 / /a\\134b ro shared:7 master:2 - fuse.nsfs nsfs ro,user_id=0\n"
        "43 27 0:40 / /plain rw - nsfs nsfs rw\n"
    )
    first, second, third = mounts.parse_mountinfo(text)
    assert (first.id, first.parent, first.device, first.root, first.target) == (36, 35, "98:0", "/mnt1", "/mnt 2")
    assert (first.fstype, first.source, first.super_options) == ("ext3", "/dev/root", "rw,errors=continue")
    assert (second.target, second.fstype, second.connection) == ("/a\\b", "fuse.nsfs", 39)
    assert third.fstype == "nsfs"


@pytest.mark.parametrize(
    ("number", "fstype", "cls"),
    [
        (1, "erofs", DeniedError),
        (15, "erofs", UnsupportedError),
        (19, "overlay", UnsupportedError),
        (5, "x", UnreachableError),
    ],
)
def test_errno_becomes_an_error_with_a_hint(number: int, fstype: str, cls: type[NsfsError]) -> None:
    error = mounts.plan_error(number, "cannot", fstype)
    assert type(error) is cls
    assert error.hint


def test_a_lower_is_known_by_its_whole_path(arena: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is mounted under the last part of its name, before or after it."""
    layout = Layout(str(arena / "root"), str(arena / "run"))
    source, view = layout.domain_run("ns/red").fuse_map("0" * 32), "0" * 32
    targets = {"/mnt/0": "/dev/vdb", f"{layout.lowers}/0": source, "/run/other/l/0": source}
    lines = [f"{n} 1 0:{n} / {to} ro - erofs {what} ro" for n, (to, what) in enumerate(targets.items())]
    monkeypatch.setattr(mounts, "load_mounts", lambda: mounts.parse_mountinfo("\n".join(lines)))
    server: Any = None
    kernel = HostKernel(layout, Host(root=True, erofs=True, file_backed=True), server)
    assert kernel.mounted_lowers() == {"0": Lower("ns/red", view, Driver.EROFS)}


def test_what_a_start_left_reads_far_ahead_again_and_what_others_mounted_stays(arena: Path) -> None:
    """The next daemon raises what one before it has written down, and nothing else."""
    image, disk = view_files(arena)
    names = []
    for target in (make_directory(arena / "ours"), make_directory(arena / "theirs")):
        step = mounts.Erofs(target=str(target), image=str(image), device=str(disk), read_ahead_kb=1028)
        names.append(mount_apart(step))
    layout = Layout(str(arena / "root"), str(arena / "run"))
    make_directory(arena / "run")
    Path(layout.starting).write_text("".join(f"{name}\n" for name in names[0]))
    server: Any = None
    kernel = HostKernel(layout, Host(root=True, erofs=True, file_backed=True), server)

    async def follow() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(kernel.follow_starts)
                assert await trio.to_thread.run_sync(wait_until, lambda: not os.path.exists(layout.starting))
                nursery.cancel_scope.cancel()

    trio.run(follow)
    assert "2048\n" in read_aheads(names[0])
    assert "1028\n" in read_aheads(names[1])
