"""A system daemon of nsfs that is ours alone, below a directory: what the lazy ways are measured on.

Owns: the process, its configuration and its state. It is asked over its control socket by this process, so that no
command's own start is in any figure. It runs by the host's settings for registries and with every default else.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsfs.errors import NsfsError, UnreachableError
from nsfs.model.report import ImageReport
from nsfs.serve import api
from nsfs.serve.client import Control, open_control, probe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nsfs.model.report import Phases
    from nsfs.serve.config import Config

_DEADLINE = 60.0
"""Seconds for the daemon to answer, and to end."""
_COMPLETE = 1800.0
"""Seconds for an image to become local."""


@dataclass(frozen=True, slots=True)
class Node:
    """The daemon, running."""

    control: Control
    root: str
    run: str

    def warm_up(self) -> None:
        """Return when its fork server works, as a host's does long before an image comes: the daemon answers sooner."""
        with contextlib.suppress(NsfsError):
            self.resolve("oci:/nowhere", "warm-up")

    def resolve(self, reference: str, namespace: str) -> ImageReport:
        """What the image is."""
        request = api.ImageRequest(reference=reference, namespace=namespace)
        return self.control.call("Inspect", request, ImageReport)

    def index(self, reference: str, namespace: str) -> None:
        """Have its layers indexed; raises where one cannot be served."""
        request = api.ImageRequest(reference=reference, namespace=namespace)
        report = self.control.call("Index", request, ImageReport)
        if refused := [layer.why for layer in report.layers if not layer.indexed]:
            raise NsfsError(f"the image cannot be had lazily: {refused[0]}")

    def mount(
        self, reference: str, target: str, namespace: str, *, driver: str = "auto", profile: str = "use"
    ) -> Phases:
        """Show it at `target`, writable; how long that took."""
        request = api.MountRequest(
            reference=reference, target=target, namespace=namespace, driver=driver, writable=True, profile=profile
        )
        phases = self.control.call("Mount", request, api.MountReport).phases
        assert phases is not None, "of a mount that was just made"
        return phases

    def umount(self, target: str) -> None:
        """Take it away."""
        self.control.call("Umount", api.UmountRequest(target=target, force=True), api.Empty)

    def complete(self, reference: str, namespace: str) -> None:
        """Have all of it local, and kept so."""
        request = api.ImageRequest(reference=reference, namespace=namespace)
        self.control.call("Pin", request, api.PinReport)
        deadline = time.monotonic() + _COMPLETE
        while not self.control.call("Offline", request, api.OfflineReport).complete:
            if time.monotonic() > deadline:
                raise NsfsError(f"the image does not become local: {reference}")
            time.sleep(0.1)

    def evict(self, reference: str, namespace: str) -> None:
        """Forget its contents; its index stays."""
        request = api.ImageRequest(reference=reference, namespace=namespace)
        self.control.call("Evict", request, api.EvictReport)

    def publish(self, reference: str) -> None:
        """Put beside the image how it is read, and what a start that was recorded reads of it."""
        words = ["--socket", f"{self.run}/nsfs.sock", "index", "push", reference]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "nsfs.cli", *words],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise NsfsError(f"nothing can be put beside the image: {done.stderr.strip()[-1000:]}")

    def end(self, namespace: str) -> None:
        """Have nothing of a namespace left."""
        request = api.NamespaceRequest(namespace=namespace, force=True)
        self.control.call("EndNamespace", request, api.NamespaceEnded)

    def disks(self) -> list[str]:
        """The files that have the domains' contents."""
        return glob.glob(f"{self.root}/domains/**/disk", recursive=True)

    def lowers(self) -> str:
        """The directory below which views are mounted."""
        return f"{self.run}/l/"


@contextlib.contextmanager
def run_node(
    directory: str,
    config: Config,
    environment: Mapping[str, str],
    *,
    trust: str = "off",
    program: str = "nsfs.cli",
) -> Iterator[Node]:
    """A daemon below `directory`, whose `environment` has these variables, too; it is gone when the block ends.

    `trust` says which artifact beside an image it believes, as `trust_index` of the configuration does; `program` is
    the module that is `nsfs` to it.
    """
    root, run = f"{directory}/root", f"{directory}/run"
    settings = _render_settings(root, run, trust, config)
    process = _start(directory, settings, environment, program)
    try:
        _wait_until_answering(process, f"{run}/nsfs.sock", f"{directory}/log")
        with open_control(f"{run}/nsfs.sock") as control:
            node = Node(control, root, run)
            node.warm_up()
            yield node
    finally:
        _end(process)


def _start(directory: str, settings: str, environment: Mapping[str, str], program: str) -> subprocess.Popen[bytes]:
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/config.toml", "w", encoding="utf-8") as file:
        file.write(settings)
    serve = [sys.executable, "-P", "-m", program, "serve", "--config", f"{directory}/config.toml"]
    with open(f"{directory}/log", "ab") as log:
        # Ctrl-C is for us, who unmount first; should we die, the kernel ends the daemon.
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "INT", *serve],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,
        )


def _render_settings(root: str, run: str, trust: str, config: Config) -> str:
    """As TOML, whose strings JSON's are."""
    registry = {
        "config_path": config.registry.config_path,
        "docker_config": config.registry.docker_config,
        "docker_config_for": "all",
    }
    plain = {"root": root, "run": run, "trust_index": trust}
    tables = {"": plain, "[containerd]": {"address": ""}, "[registry]": registry}
    lines = [line for head, keys in tables.items() for line in (head, *_render_keys(keys))]
    return "\n".join(lines) + "\n"


def _render_keys(keys: Mapping[str, str]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in keys.items()]


def _wait_until_answering(process: subprocess.Popen[bytes], socket: str, log: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while True:
        try:
            return probe(socket)
        except UnreachableError:
            if process.poll() is not None or time.monotonic() > deadline:
                with open(log, encoding="utf-8", errors="replace") as file:
                    raise UnreachableError(f"no daemon of our own starts: {file.read()[-1000:]}") from None
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
