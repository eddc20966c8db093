"""What a tenant learns by a clock of another's image: in an isolated namespace, and in a shared domain without a grant.

Two images at a time, of which one is a's, and the other was only downloaded by nobody in particular, so that the
registry's caches do not differ. b times what it can do with each, and so does c, with a leak planted (clocks.py). What
the calls say is compared in test_answers.py and test_shared_domain.py.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest

import clocks
import ranks
from clocks import SURE, Watch
from fakes import OCI_MANIFEST, FakeRegistry
from images import Image, file, gzip_layer
from nsfs.model.digest import Digest
from nsfs.model.lazy import lazy_name, parse_offer
from nsfs_daemon import Daemon, run_daemon
from published import publish
from snapshots_api import REF, Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import grpc

    from images import Layer


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


# From inside of an isolated namespace


class Tenant:
    """Who pulls and starts, and looks at the clock."""

    def __init__(self, daemon: Daemon, namespace: str, target: Path) -> None:
        self.backend = Backend(daemon.socket, namespace=namespace)
        self._namespace = namespace
        self._target = target / namespace
        self._names = 0

    def pull(self, image: Image, reference: str, watch: Watch) -> str:
        """The record of its one layer."""
        (labels,) = offers(image, reference)
        with watch.of("prepare"):
            assert self.backend.offer(self._namespace, "", labels)
        with watch.of("list"):
            (name,) = self.backend.ask(labels[REF], "")
        return name

    def time(self, image: Image, reference: str, watch: Watch) -> None:
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

    def _look_for(self, asking: Callable[[str], object], image: Image, reference: str) -> None:
        """Ask for a's record of it by its name, which anybody can work out."""
        (labels,) = offers(image, reference)
        with pytest.raises(Exception, match="no such snapshot") as refused:
            asking(lazy_name("a", "nsfs", "", parse_offer(labels)))
        error: grpc.RpcError = refused.value  # type: ignore[assignment]
        assert error.code().name == "NOT_FOUND"


class Had(NamedTuple):
    """An image that a has, and one that nobody has; see clocks.Pair."""

    tenants: Mapping[str, Tenant]
    had: tuple[Image, str]
    other: tuple[Image, str]

    def time(self, who: str, watch: Watch, *, first: bool) -> None:
        self.tenants[who].time(*(self.had if first else self.other), watch)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_tells_whether_another_has_an_image(registry: FakeRegistry, tmp_path: Path) -> None:
    with run_daemon(str(tmp_path / "d"), {"prepare_wait": "30s"}) as daemon, ExitStack() as stack:
        tenants = {name: Tenant(daemon, name, tmp_path) for name in "abc"}
        for tenant in tenants.values():
            stack.enter_context(tenant.backend)

        def batch(numbers: range) -> Iterator[Had]:
            for number in numbers:
                pair = [_publish_one(registry, number, each) for each in range(2)]
                tenants["a"].pull(*pair[0], Watch(0))
                for layer in pair[1][0].layers:
                    assert registry.blobs[str(layer.digest)]
                yield Had(tenants, *pair)
            tenants["b"].backend.cleanup()

        found = clocks.compare(batch)
    found.check()


def _publish_one(registry: FakeRegistry, pair: int, number: int) -> tuple[Image, str]:
    image = Image((_layer(pair, number),))
    return image, publish(registry, image, f"pair{pair}/{number}")


def _layer(pair: int, number: int) -> Layer:
    return gzip_layer([file("f", b"%d of pair %d" % (number, pair))])


# Of a shared domain, without a grant


class Intruder:
    """Who names layers of a's, in each way that a tenant has, and times how long nsfs takes to have none of it.

    The answer is an ordinary snapshot, into which containerd would unpack what it downloaded.
    """

    def __init__(self, daemon: Daemon, namespace: str, registries: Mapping[str, FakeRegistry]) -> None:
        self.backend = Backend(daemon.socket, namespace=namespace)
        self._namespace = namespace
        self._registries = registries
        self._names = 0

    def time(self, layer: Layer, watch: Watch) -> None:
        self._names += 1
        name, image = f"{self._namespace}/{self._names}", Image((layer,))
        for call, registry in self._registries.items():
            labels = _name_it(registry, image, name)
            key = self.backend.name(self._namespace, call)
            with watch.of(call):
                assert self.backend.prepare(key, labels=labels)
            self.backend.remove(key)


def _name_it(registry: FakeRegistry, image: Image, name: str) -> dict[str, str]:
    """Give a repository a manifest that has the image's layer, and nothing of that; the labels of its offer."""
    config = str(registry.add_blob(image.config_blob)["digest"])
    registry.members[name] = registry.honest = {config}
    registry.claimed = len(image.layers[0].blob)
    registry.add_document(name, "latest", image.manifest, OCI_MANIFEST)
    (labels,) = offers(image, f"{registry.host}/{name}:latest")
    return labels


class Named(NamedTuple):
    """A layer that a has, and one that nobody has; see clocks.Pair."""

    intruders: Mapping[str, Intruder]
    had: Layer
    other: Layer

    def time(self, who: str, watch: Watch, *, first: bool) -> None:
        self.intruders[who].time(self.had if first else self.other, watch)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ways", [("own", "victims"), ("lying",)], ids=["refused", "lied to"])
def test_a_refusal_takes_as_long_whether_or_not_the_layer_is_there(ways: Sequence[str], tmp_path: Path) -> None:
    """By a registry of b's own, that has nothing of a's; by the one that has it, for a; by one that says it has it."""
    with ExitStack() as stack:
        registries = {way: stack.enter_context(FakeRegistry(lies=way == "lying")) for way in ("victims", *ways)}
        daemon = stack.enter_context(run_daemon(str(tmp_path / "d"), {"isolation": "shared", "prepare_wait": "30s"}))
        asked = {way: registries[way] for way in ways}
        intruders = {name: Intruder(daemon, name, asked) for name in "bc"}
        a = stack.enter_context(Backend(daemon.socket, namespace="a"))
        for intruder in intruders.values():
            stack.enter_context(intruder.backend)

        def batch(numbers: range) -> Iterator[Named]:
            had, others = ([_layer(number, each) for number in numbers] for each in range(2))
            a.pull("a", *_publish_all(registries["victims"], had, f"had{numbers.start}"))
            _publish_all(registries["victims"], others, f"other{numbers.start}")
            yield from (Named(intruders, *pair) for pair in zip(had, others, strict=True))
            a.cleanup()

        found = clocks.compare(batch)
    found.check()


def _publish_all(registry: FakeRegistry, layers: Sequence[Layer], name: str) -> tuple[Image, str]:
    """As one image, in a repository that has just that."""
    image = Image(layers)
    registry.members[name] = {str(Digest.of(blob)) for blob in image.blobs()}
    return image, publish(registry, image, name)


def test_the_test_itself() -> None:
    """It sees what is there, and only by chance what is not."""
    chance = random.Random(7)
    even = [chance.gauss(0, 1) for _ in range(400)]
    assert abs(ranks.score(even)) < ranks.CRITICAL
    assert ranks.score([each + 0.5 for each in even]) > ranks.CRITICAL
    assert ranks.score([each - 0.5 for each in even]) < -ranks.CRITICAL
    assert ranks.power(even, 0.5) > SURE
    assert ranks.power(even, 0.05) < 0.1
