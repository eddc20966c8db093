"""Control groups of workers: a leaf below the cgroup that the configuration names, in each hierarchy that has it.

Owns finding hierarchies (cgroups(7): version 2, version 1, or both side by side), making leaves and removing them. A
leaf is the worker's alone, beside those of containers, so that freezing a container does not freeze who reads for it;
version 1's freezer, devices and cpusets are left out for the same reason. What a leaf uses counts for its parent.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nsfs.errors import DeniedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COUNTING: Final = frozenset({"cpu", "cpuacct", "memory", "blkio", "pids", "net_cls", "net_prio", "hugetlb"})
"""Controllers of version 1 that count or share out."""


def plan_parents(mountinfo: str, cgroup: str) -> list[str]:
    """The directories in which `cgroup`, as /proc/<pid>/cgroup names it, would be, by proc(5)'s mountinfo. Pure."""
    return [f"{point.rstrip('/')}{cgroup}" for point in _hierarchies(mountinfo)]


def _hierarchies(mountinfo: str) -> Iterator[str]:
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if fields[3] == "/" and (kind == "cgroup2" or (kind == "cgroup" and _COUNTING.intersection(options))):
            yield point


def check_cgroup(cgroup: str) -> str:
    """`cgroup` itself where it is a cgroup's path; raises UsageError."""
    if not cgroup.startswith("/") or ".." in cgroup.split("/") or cgroup.startswith("/sys/"):
        raise UsageError(f"not a cgroup: {cgroup}", hint="its path as /proc/PID/cgroup shows it, such as /tenants/a")
    return cgroup.rstrip("/")


def find_parents(cgroup: str) -> list[str]:
    """Where `cgroup` is; raises NotFoundError if it is in no hierarchy, UsageError if it is no cgroup's path."""
    parents = _parents(check_cgroup(cgroup))
    if not parents:
        raise NotFoundError(f"no such cgroup: {cgroup}", hint="make it first; nsfs puts a leaf of its own below it")
    return parents


def _parents(cgroup: str) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return [path for path in plan_parents(file.read(), cgroup) if os.path.isdir(path)]


def make_leaves(parents: Sequence[str], name: str) -> tuple[str, ...]:
    """A cgroup `name` below each of `parents`, made where it is missing; raises DeniedError."""
    leaves = tuple(f"{parent}/{name}" for parent in parents)
    for leaf in leaves:
        try:
            os.makedirs(leaf, 0o755, exist_ok=True)
        except OSError as error:
            raise DeniedError(f"cannot make a cgroup: {leaf}: {error.strerror}") from None
    return leaves


def remove_leaves(cgroup: str, name: str) -> None:
    """Take away the cgroups `name` below `cgroup`, where nobody is in them."""
    for parent in _parents(cgroup):
        with suppress(OSError):
            os.rmdir(f"{parent}/{name}")
