"""What one tenant's slow registry costs the others of a node: containerd holds its locks through calls of ours.

A Prepare is made under a lock that a garbage collection then waits for, and everybody behind it. So B's calls are timed
at a steady rate, whether or not earlier ones were answered, while A pulls and garbage is collected again and again.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

import busybox
import published
from containerd import NEWER
from fakes import FakeRegistry
from images import Image, file, gzip_layer, sample_content
from nodes import Node, run_node, wait_until
from nsfs.serve.proto import leases_pb2
from snapshots_api import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

SLOW = [gzip_layer([file(f"slow{number}", sample_content(100_000, number))]) for number in range(3)]
CALLS = 30
PAUSE = 0.1
"""Seconds between two calls: far less than containerd can do, whose every change is synced."""
ROOT = {"containerd.io/gc.root": "now"}
"""The label that keeps a snapshot from the collection."""


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """Drips every layer of the image `slow`."""
    with FakeRegistry() as running:
        yield running
        running.go_on.set()


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with run_node(str(tmp_path_factory.mktemp("node")), NEWER) as running:
        published.publish(registry, Image((busybox.base(),)), "good")
        published.publish(registry, Image((busybox.base(), *SLOW)), "slow")
        registry.script, registry.faults_on = "O" * len(SLOW), "|".join(layer.digest for layer in SLOW)
        yield running
        registry.go_on.set()
        for namespace in ("a", "b"):
            running.clear(namespace)
        assert running.is_clean()


def pull(node: Node, registry: FakeRegistry, name: str, namespace: str) -> subprocess.Popen[bytes]:
    ctr = [*node.containerd.enter, f"{node.containerd.binaries}/ctr", "-a", node.containerd.socket, "-n", namespace]
    command = ("images", "pull", "--plain-http", "--snapshotter", "nsfs", f"{registry.host}/{name}:latest")
    return subprocess.Popen([*ctr, *command], stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def collecting_garbage(node: Node) -> Iterator[list[float]]:
    """Again and again, in the background; gives when each collection ended."""
    ended: list[float] = []
    over = threading.Event()
    metadata = (("containerd-namespace", "b"),)

    def collect() -> None:
        with grpc.insecure_channel(f"unix:{node.containerd.socket}") as channel:
            while not over.wait(0.2):
                name = str(len(ended))
                _ask(channel, "Create", leases_pb2.CreateRequest(id=name), leases_pb2.CreateResponse, metadata)
                _ask(channel, "Delete", leases_pb2.DeleteRequest(id=name, sync=True), Empty, metadata)
                ended.append(time.monotonic())

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(collect)
        try:
            yield ended
        finally:
            over.set()
            running.result()


def _ask(channel: grpc.Channel, method: str, request: Any, answer: Any, metadata: Any) -> None:
    path = f"/containerd.services.leases.v1.Leases/{method}"
    channel.unary_unary(path, type(request).SerializeToString, answer.FromString)(request, metadata=metadata)


def timed(backend: Backend, parent: str) -> list[float]:
    """How long each of many Prepares took, in order of length; each snapshot is removed: garbage."""

    def prepare(key: str) -> float:
        start = time.monotonic()
        backend.prepare(key, parent, labels=ROOT)
        took = time.monotonic() - start
        backend.remove(key)
        return took

    running: list[Future[float]] = []
    with ThreadPoolExecutor(CALLS) as pool:
        for number in range(CALLS):
            running.append(pool.submit(prepare, f"k{number}"))
            time.sleep(PAUSE)
        return sorted(call.result() for call in running)


def test_a_dripping_registry_and_a_garbage_collection_hold_nobody_up(node: Node, registry: FakeRegistry) -> None:
    assert pull(node, registry, "good", "b").wait() == 0
    (parent,) = node.snapshots("b")
    with Backend(node.containerd.socket, namespace="b") as backend, collecting_garbage(node) as ended:
        pulling = pull(node, registry, "slow", "a")
        assert wait_until(lambda: len(registry.script) < len(SLOW))
        begun = len(ended)
        times = timed(backend, parent)
        assert len(ended) > begun
    assert times[int(CALLS * 0.8)] < 1, "what is held up is held up with all that come after it"
    assert pulling.wait(100) == 0
    assert registry.script == ""
    assert not registry.go_on.is_set()


def test_200_waiting_mounts_leave_stat_quick(node: Node, registry: FakeRegistry) -> None:
    assert pull(node, registry, "slow", "a").wait() == 0
    (top,) = set(node.snapshots("a")) - node_parents(node)
    with Backend(node.containerd.socket, namespace="a") as backend:
        backend.prepare("container", top, labels=ROOT)
        waiting = [backend.start_mounts("container") for _ in range(200)]

        def stat() -> float:
            start = time.monotonic()
            backend.stat(top)
            return time.monotonic() - start

        assert wait_until(lambda: sorted(stat() for _ in range(50))[25] < 0.02)
        assert not any(call.done() for call in waiting)
        registry.go_on.set()
        (mount,) = waiting[0].result(timeout=60).mounts
        assert mount.type == "overlay"
        for call in waiting[1:]:
            call.cancel()
        backend.remove("container")


def node_parents(node: Node) -> set[str]:
    with Backend(node.containerd.socket, namespace="a") as backend:
        return {info.parent for info in backend.select()}
