"""A namespace's worker in a network namespace and a cgroup: what answers only there, by its names, for nobody else."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, file, gzip_layer
from mounting import arena
from networks import network
from nsfs.errors import UsageError
from nsfs.serve.cgroups import check_cgroup, plan_parents
from nsfs_daemon import NSFS, run_daemon
from published import publish
from users import cat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs_daemon import Daemon

__all__ = ["arena"]

NAME = "registry.only-there.test"
A, B = (Image((gzip_layer([file("whose", text)]),)) for text in (b"a's", b"b's"))


@contextmanager
def registries(base: Path) -> Iterator[dict[str, str]]:
    """One in each of two networks, both by one name there; gives images' references, by network."""
    found = {}
    with ExitStack() as stack:
        for name, image in (("a", A), ("b", B)):
            inside = stack.enter_context(network(f"{base}/net-{name}", (NAME,)))
            registry = FakeRegistry()
            inside.run(registry.__enter__)
            stack.push(registry)
            found[name] = publish(registry, image, "app").replace("127.0.0.1", NAME)
            hosts = base / "hosts" / found[name].partition("/")[0]
            hosts.mkdir(parents=True, exist_ok=True)  # both may have got the same port
            (hosts / "hosts.toml").write_text(f'server = "http://{hosts.name}"\n')
        yield found


@pytest.fixture
def cgroup() -> Iterator[str]:
    """A tenant's, in every hierarchy that there is."""
    name = f"/nsfs-test-{os.getpid()}"
    with open("/proc/self/mountinfo") as mountinfo:
        made = plan_parents(mountinfo.read(), name)
    for path in made:
        os.mkdir(path)
    yield name
    for path in made:
        os.rmdir(path)


def read(daemon: Daemon, reference: str, namespace: str) -> bytes:
    return cat(daemon, f"{reference}:/whose", "--namespace", namespace)


def test_a_registry_that_answers_in_one_network_only(arena: Path, cgroup: str) -> None:
    (arena / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    usual = "/etc/netns/net-b/resolv.conf"
    with registries(arena) as references, ExitStack() as stack:
        os.makedirs(os.path.dirname(usual))
        stack.callback(os.removedirs, os.path.dirname(usual))
        shutil.copy(arena / "resolv.conf", usual)
        stack.callback(os.unlink, usual)
        tenants = {
            "namespace.team-a": {
                "netns": f"{arena}/net-a",
                "resolv_conf": f"{arena}/resolv.conf",
                "cgroup": cgroup,
            },
            "namespace.team-b": {"netns": f"{arena}/net-b"},
            "namespace.team-c": {"netns": f"{arena}/gone"},
        }
        settings = {
            "registry": {"config_path": f"{arena}/hosts", "connect_timeout": "2s"},
            "on_error": "eio",
            **tenants,
        }
        daemon = stack.enter_context(run_daemon(str(arena / "d"), settings))
        assert read(daemon, references["a"], "team-a") == b"a's"
        assert read(daemon, references["b"], "team-b") == b"b's"
        for reference, namespace in ((references["a"], "team-b"), (references["a"], "elsewhere")):
            refused = daemon.nsfs("stat", f"{reference}:/whose", "--namespace", namespace, check=False)
            assert refused.returncode == 5, refused.stderr
        refused = daemon.nsfs("stat", f"{references['a']}:/whose", "--namespace", "team-c", check=False)
        assert refused.returncode == 3
        assert "namespace.team-c.netns: no such network namespace" in refused.stderr
        workers = daemon.workers()
        for name in ("a", "b"):
            inside = os.stat(f"/proc/{workers[f'ns/team-{name}']}/ns/net")
            assert os.path.samestat(inside, os.stat(f"{arena}/net-{name}"))
        leaves = glob.glob(f"/sys/fs/cgroup/*{cgroup}/nsfs-*") + glob.glob(f"/sys/fs/cgroup{cgroup}/nsfs-*")
        assert leaves
        for leaf in leaves:
            with open(f"{leaf}/cgroup.procs") as file:
                assert workers["ns/team-a"] in map(int, file.read().split()), leaf
        daemon.nsfs("ns", "rm", "team-a", "--force")
        assert not any(os.path.exists(leaf) for leaf in leaves)


def test_check_names_what_is_not_there(arena: Path) -> None:
    (arena / "config.toml").write_text('[namespace.team-a]\nnetns = "/nonexistent/a"\n')
    command = [*NSFS, "serve", "--check", "--config", str(arena / "config.toml")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 3
    assert "namespace.team-a.netns: no such network namespace: /nonexistent/a" in done.stderr


MOUNTINFO = """\
25 1 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro
26 25 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
27 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
28 25 0:25 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
29 25 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
30 25 0:27 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
31 25 0:28 / /sys/fs/cg\\040pids rw - cgroup cgroup rw,pids
"""


def test_hierarchies_that_count() -> None:
    assert plan_parents(MOUNTINFO, "/t") == [
        "/sys/fs/cgroup/unified/t",
        "/sys/fs/cgroup/cpu,cpuacct/t",
        "/sys/fs/cg pids/t",
    ]
    assert plan_parents("9 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "/t") == ["/sys/fs/cgroup/t"]


V2_ONLY = """
import os, sys
from nsfs.serve.cgroups import find_parents, make_leaves, remove_leaves

parents = find_parents(sys.argv[1])
(leaf,) = make_leaves(parents, "nsfs-x")
with open(f"{leaf}/cgroup.procs", "w") as file:
    file.write("0")
with open("/proc/self/cgroup") as file:
    print(next(line.strip() for line in file if line.startswith("0::")))
with open("/sys/fs/cgroup/cgroup.procs", "w") as file:
    file.write("0")
remove_leaves(sys.argv[1], "nsfs-x")
print(parents, os.path.exists(leaf))
"""


def test_a_host_with_version_2_alone() -> None:
    """In a mount namespace that has no other hierarchy."""
    name = f"/nsfs-test-v2-{os.getpid()}"
    script = (
        'umount --recursive /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && mkdir "/sys/fs/cgroup$3" || exit'
    )
    script += (
        '; "$1" -c "$2" "$3"; status=$?; rmdir "/sys/fs/cgroup$3/nsfs-x" 2>&-; rmdir "/sys/fs/cgroup$3"; exit $status'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, V2_ONLY, name]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout == f"0::{name}/nsfs-x\n['/sys/fs/cgroup{name}'] False\n", done.stderr


@pytest.mark.parametrize("path", ["t", "", "/a/../b", "/sys/fs/cgroup/t"])
def test_what_is_no_cgroups_path(path: str) -> None:
    with pytest.raises(UsageError, match="not a cgroup"):
        check_cgroup(path)
