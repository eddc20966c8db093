"""Whether containers run here at all, on both releases of containerd, and whether nothing of them is left."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import RELEASES, run_containerd
from images import write_oci_layout
from registry import push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    layout = write_oci_layout(tmp_path_factory.mktemp("layout"), busybox.image())
    with run_registry() as registry:
        push_layout(str(layout), registry, "busybox")
        yield f"{registry.host}/busybox:latest"


@pytest.mark.parametrize("release", RELEASES)
def test_runc_and_runsc_run_a_pulled_image(tmp_path: Path, release: str, reference: str) -> None:
    with run_containerd(str(tmp_path), release=release) as server:
        server.ctr("images", "pull", "--plain-http", reference)
        assert server.run(reference, "a") == "the second layer\n"
        kernel = server.run(reference, "b", "/bin/cat", "/proc/version", options=server.runsc())
        assert kernel.startswith("Linux version 4.4.0 ")


class _OnPurposeError(Exception):
    pass


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path, reference: str) -> None:
    processes: list[str] = []
    cgroups: list[str] = []
    with pytest.raises(_OnPurposeError):
        _fail_with_a_running_container(str(tmp_path), reference, processes, cgroups)
    assert len(processes) == 3  # containerd, shim, sleep
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in processes)
    assert "/sys/fs/cgroup/pids" in map(os.path.dirname, cgroups)
    assert not any(os.path.exists(cgroup) for cgroup in cgroups)
    with open("/proc/self/mountinfo") as file:
        assert str(tmp_path) not in file.read()


def _fail_with_a_running_container(directory: str, reference: str, processes: list[str], cgroups: list[str]) -> None:
    with run_containerd(directory) as server:
        server.ctr("images", "pull", "--plain-http", reference, namespace="left")
        server.ctr("run", "--detach", reference, "a", "/bin/sleep", "1000", namespace="left")
        processes += _processes_like(server.pid)
        with open(server.see("/sys/fs/cgroup/pids/left/a/cgroup.procs")) as file:
            processes += file.read().split()
        with open(f"/proc/{server.pid}/cgroup") as file:
            (name,) = {line.rstrip().partition(":/")[2] for line in file}
        cgroups += glob.glob(f"/sys/fs/cgroup/*/{name}")
        raise _OnPurposeError


def _processes_like(pid: int) -> list[str]:
    """Processes of the same pid namespace."""
    namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
    found = []
    for other in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{other}/ns/pid").st_ino == namespace:
                found.append(other)
    return found
