"""The main job, measured: a real image from a real registry, four ways to its first output.

Owns: everything that it starts (a registry, a containerd, an nsfs daemon, all private, all on loopback or on sockets of
their own) and one temporary directory; both are gone at the end, also after Ctrl-C. What takes long to make, the image,
stays in `.cache` for the next time. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench import containerd, estargz, images
from bench.apart import run_apart
from nsfs_daemon import Daemon, run_daemon
from registry import Registry, push_layout, run_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Opener = Callable[[str], AbstractContextManager[None]]
    """Makes the image's root appear at a directory."""

PLAIN, ESTARGZ = "demo/python:latest", "demo/python:estargz"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way cost."""

    way: str
    seconds: float
    """From the first command to the first line of the program in the image."""
    fetched: int
    """Bytes that the registry sent, by its own log."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the ways are measured."""

    registry: Registry
    directory: str
    image: images.Built

    def reference(self, name: str) -> str:
        """The image `name` in this registry."""
        return f"{self.registry.host}/{name}"

    def sent(self) -> int:
        """Bytes of bodies that the registry has sent so far."""
        time.sleep(0.3)  # it writes its log when an answer is over
        with open(f"{self.registry.root}/log", errors="replace") as log:
            return sum(int(size) for size in re.findall(r'"GET [^"]*" 20[06] (\d+) ', log.read()))


def main() -> int:
    """Run the demonstration; returns the exit status."""
    if os.geteuid() != 0:
        say("the demonstration mounts images and makes one with debootstrap: run it as root")
        return 9
    demonstrate()
    return 0


def demonstrate() -> None:
    """Make the image, measure the ways, print the table."""
    say("the image, made of Debian packages (kept in .cache):")
    image = images.build(images.PYTHON)
    with tempfile.TemporaryDirectory(prefix="nsfs-demo-", dir="/var/tmp") as directory, run_registry() as registry:
        say(f"pushing it to a registry at {registry.host}, plain and as eStargz")
        stage = Stage(registry, directory, image)
        push_layout(image.layout, registry, "demo/python", tag="latest")
        converted, missing = try_converting(image)
        if converted:
            push_layout(converted, registry, "demo/python", tag="estargz")
        print_table(image, [*pull_whole(stage), *mount_lazily(stage, estargz=bool(converted))])
        if missing:
            print(f"the fourth way, eStargz, was left out: {missing}")
    say("\nunmounted, stopped and removed: nothing is left but .cache")


def try_converting(image: images.Built) -> tuple[str, str]:
    """The image's eStargz layout, or why there is none."""
    try:
        return estargz.convert(image), ""
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return "", str(error)


def pull_whole(stage: Stage) -> Iterator[Cost]:
    """The way without nsfs."""
    with containerd.run_containerd(f"{stage.directory}/c") as server:
        way = f"full pull and unpack: containerd {server.version.partition('+')[0]}"
        yield measure(stage, way, lambda target: server.rootfs(stage.reference(PLAIN), target))


def mount_lazily(stage: Stage, *, estargz: bool) -> Iterator[Cost]:
    """The ways with nsfs."""
    plain = stage.reference(PLAIN)
    with run_daemon(f"{stage.directory}/nsfs") as daemon:
        yield measure(stage, "nsfs, first use of the plain image: reads all of it once", lazily(daemon, plain))
        daemon.nsfs("evict", plain)
        yield measure(stage, "nsfs, the plain image after nsfs evict: by ranges", lazily(daemon, plain))
        if estargz:
            reference = stage.reference(ESTARGZ)
            yield measure(stage, "nsfs, first use of the same image as eStargz", lazily(daemon, reference))


def lazily(daemon: Daemon, reference: str) -> Opener:
    """`nsfs mount` of `reference`, with what `nsfs status` says of it at the end."""

    @contextlib.contextmanager
    def opened(target: str) -> Iterator[None]:
        with daemon.mounted(reference, target):
            yield
            (mount,) = daemon.json("status")["mounts"]
            say(f"    nsfs status: {mount['files']} files, {mib(mount['local'])} of {mib(mount['size'])} local")

    return opened


def measure(stage: Stage, way: str, opener: Opener) -> Cost:
    """Open the image one way, run its program, close it."""
    say(f"{way}")
    target = f"{stage.directory}/mnt"
    os.makedirs(target, exist_ok=True)
    before = stage.sent()
    start = time.perf_counter()
    with opener(target):
        said = subprocess.run(
            ["chroot", target, *stage.image.recipe.command], check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        say(f"    {said.stdout.strip()}")
        return Cost(way, seconds, stage.sent() - before)


def print_table(image: images.Built, costs: list[Cost]) -> None:
    """The result, on stdout."""
    contents = f"{len(image.layers)} layers, {image.files} entries, {mib(image.stream_size)} unpacked"
    print(f"\nimage: {mib(image.size)}: {contents}\n")
    print(f"{'way':<62} {'first output':>12} {'fetched':>10} {'of image':>9}")
    for cost in costs:
        share = f"{cost.fetched / image.size:.1%}"
        print(f"{cost.way:<62} {cost.seconds:>10.2f} s {mib(cost.fetched):>10} {share:>9}")


def mib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.1f} MiB"


def say(text: str) -> None:
    """Talk on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_apart(main)
