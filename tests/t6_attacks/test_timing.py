"""What a tenant learns by a clock: from inside of an isolated namespace, nothing tells whether another has an image.

Two images at a time, of which one is a's, and the other was only downloaded by nobody in particular, so that the
registry's caches do not differ. b times what it can do with each, in an order that chance decides; c does the same with
a leak of a millisecond planted. Samples are taken until such a leak would be seen with a probability of SURE, and c's
is: then b must have seen none. What the calls say is compared in test_answers.py.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import pytest

import ranks
from fakes import FakeRegistry
from images import Image, file, gzip_layer
from nsfs.model.lazy import lazy_name, parse_offer
from nsfs_daemon import Daemon, run_daemon
from published import publish
from snapshots_api import REF, Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import grpc

LEAK: Final = 0.001
"""Seconds."""
SURE: Final = 0.95
BATCH: Final = 100
"""Pairs between two looks at the power."""
LEAST: Final = 500
"""Pairs, however even they are: a tenant is given a thousand Prepares, and as many of each other call."""
MOST: Final = 5000
CALLS = ("prepare", "list", "start", "read", "usage", "stat")

Times = dict[str, float]


class Watch:
    """Adds up the seconds that each call takes; a `leak` comes on top."""

    def __init__(self, leak: float) -> None:
        self.times: Times = defaultdict(float)
        self._leak = leak

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if self._leak:
            time.sleep(self._leak)
        self.times[call] += time.perf_counter() - begun


class Tenant:
    """Who pulls and starts, and looks at the clock."""

    def __init__(self, daemon: Daemon, namespace: str, target: Path, leak: float = 0) -> None:
        self.backend = Backend(daemon.socket, namespace=namespace)
        self._namespace = namespace
        self._target = target / namespace
        self._leak = leak
        self._names = 0

    def pull(self, image: Image, reference: str, watch: Watch) -> str:
        """The record of its one layer."""
        (labels,) = offers(image, reference)
        with watch.of("prepare"):
            assert self.backend.offer(self._namespace, "", labels)
        with watch.of("list"):
            (name,) = self.backend.ask(labels[REF], "")
        return name

    def time(self, image: Image, reference: str, *, had: bool) -> Times:
        """Seconds of each call; what `had` says is told by the planted leak."""
        watch = Watch(self._leak if had else 0)
        name = self.pull(image, reference, watch)
        self._names += 1
        key = f"{self._namespace}/{self._names}/c"
        with ExitStack() as stack:
            with watch.of("start"):
                root = stack.enter_context(mounted(self.backend.prepare(key, name), self._target))
            with watch.of("read"):
                assert (root / "f").read_bytes()
            with watch.of("usage"):
                self.backend.usage(name)
                self._look_for(self.backend.usage, image, reference)
            with watch.of("stat"):
                self._look_for(self.backend.stat, image, reference)
        for each in (key, name):
            self.backend.remove(each)
        return watch.times

    def _look_for(self, asking: Callable[[str], object], image: Image, reference: str) -> None:
        """Ask for a's record of it by its name, which anybody can work out."""
        (labels,) = offers(image, reference)
        with pytest.raises(Exception, match="no such snapshot") as refused:
            asking(lazy_name("a", "nsfs", "", parse_offer(labels)))
        error: grpc.RpcError = refused.value  # type: ignore[assignment]
        assert error.code().name == "NOT_FOUND"


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_tells_whether_another_has_an_image(registry: FakeRegistry, tmp_path: Path) -> None:
    with run_daemon(str(tmp_path / "d"), {"prepare_wait": "30s"}) as daemon:
        a, b = Tenant(daemon, "a", tmp_path), Tenant(daemon, "b", tmp_path)
        c = Tenant(daemon, "c", tmp_path, LEAK)
        honest: list[Times] = []
        planted: list[Times] = []
        while len(honest) < LEAST or (len(honest) < MOST and not _is_sure(honest)):
            for number in range(len(honest), len(honest) + BATCH):
                pair = _publish_pair(registry, number)
                a.pull(*pair[0], Watch(0))
                for layer in pair[1][0].layers:
                    assert registry.blobs[str(layer.digest)]
                for tenant, differences in ((b, honest), (c, planted)):
                    differences.append(_difference(tenant, pair, random.Random(number)))
                b.backend.cleanup()
        for tenant in (a, b, c):
            tenant.backend.__exit__()
    found = {call: ranks.score([each[call] for each in honest]) for call in CALLS}
    print({"pairs": len(honest), "powers": _powers(honest), "scores": found})
    assert _is_sure(honest), f"no statement is possible on this machine, with {len(honest)} pairs: {_powers(honest)}"
    for call in CALLS:
        assert ranks.score([each[call] for each in planted]) > ranks.CRITICAL, f"the planted leak is not seen: {call}"
    assert all(abs(score) < ranks.CRITICAL for score in found.values()), f"with {len(honest)} pairs: {found}"


def _publish_pair(registry: FakeRegistry, number: int) -> list[tuple[Image, str]]:
    images = [Image((gzip_layer([file("f", b"%d of pair %d" % (each, number))]),)) for each in range(2)]
    return [(image, publish(registry, image, f"pair{number}/{each}")) for each, image in enumerate(images)]


def _difference(tenant: Tenant, pair: list[tuple[Image, str]], chance: random.Random) -> Times:
    """Of what a has against what nobody has, timed in an order that chance decides."""
    order = [0, 1]
    chance.shuffle(order)
    times = {which: tenant.time(*pair[which], had=which == 0) for which in order}
    return {call: times[0][call] - times[1][call] for call in CALLS}


def _is_sure(differences: list[Times]) -> bool:
    return bool(differences) and min(_powers(differences).values()) >= SURE


def _powers(differences: list[Times]) -> Mapping[str, float]:
    return {call: ranks.power([each[call] for each in differences], LEAK) for call in CALLS}


def test_the_test_itself() -> None:
    """It sees what is there, and only by chance what is not."""
    chance = random.Random(7)
    even = [chance.gauss(0, 1) for _ in range(400)]
    assert abs(ranks.score(even)) < ranks.CRITICAL
    assert ranks.score([each + 0.5 for each in even]) > ranks.CRITICAL
    assert ranks.score([each - 0.5 for each in even]) < -ranks.CRITICAL
    assert ranks.power(even, 0.5) > SURE
    assert ranks.power(even, 0.05) < 0.1
