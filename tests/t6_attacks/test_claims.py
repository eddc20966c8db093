"""What a tenant's image claims of itself: diff IDs and blobs of others, over bytes of its own.

Each attack is carried out first where nobody is suspicious, and works; then by two tenants of a real containerd 2.1.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

import busybox
from containerd import NEWER, run_containerd
from fakes import FakeRegistry
from images import Image, Layer, file, gzip_layer
from nodes import Node, run_node
from published import estargz_layer, publish, publish_manifest
from worlds import Naive, RefusedError, Tenants, World, pretending

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APART = {"a": ("team-a", "nsfs"), "b": ("team-b", "nsfs")}
"""Tenants in namespaces of their own."""
NAMED = {"a": ("k8s.io", "nsfs-a"), "b": ("k8s.io", "nsfs-b")}
"""Tenants in one namespace, as all of Kubernetes' are, with plugin names of their own."""
TOGETHER = {"a": ("team", "nsfs"), "b": ("team", "nsfs")}
"""Tenants whom nothing tells apart."""
OVERLAYFS = {"a": ("over-a", "overlayfs"), "b": ("over-b", "overlayfs")}
"""containerd as it comes."""

SECRET, OWN, GENUINE, POISON = b"private to a", b"b's own", b"the real tool", b"what b put there"
FORMATS = ("plain", "estargz")


def private(seed: str) -> Image:
    """Of a; `seed` makes it another image, for another test on the same node."""
    return Image((busybox.base(), gzip_layer([file("secret", SECRET), file("seed", seed.encode())])))


def public(seed: str) -> Image:
    return Image((busybox.base(), gzip_layer([file("tool", GENUINE), file("seed", seed.encode())])))


def own_layer(kind: str, name: str, content: bytes) -> Layer:
    items = [file(name, content)]
    return gzip_layer(items) if kind == "plain" else estargz_layer(items)


# The attacks: each gives what the attacker wanted, where it works


def steal(world: World, registry: FakeRegistry, kind: str, seed: str) -> bytes:
    """b's configuration lists a's diff IDs, over a blob of b's."""
    secret = private(seed)
    world.pull("a", publish(registry, secret, f"{seed}/private"))
    forged = publish(registry, pretending(secret, own_layer(kind, "secret", OWN)), f"{seed}/forged")
    world.pull("b", forged)
    return world.read("b", forged, "/secret")


def poison(world: World, registry: FakeRegistry, kind: str, seed: str) -> bytes:
    """b is first with a public image's diff IDs, over a blob of b's; then a pulls the real one."""
    real = public(seed)
    forged = publish(registry, pretending(real, own_layer(kind, "tool", POISON)), f"{seed}/forged")
    with contextlib.suppress(RefusedError):
        world.pull("b", forged)
    genuine = publish(registry, real, f"{seed}/public")
    world.pull("a", genuine)
    return world.read("a", genuine, "/tool")


def name_blobs(world: World, mine: FakeRegistry, theirs: FakeRegistry, seed: str) -> bytes:
    """b runs a registry, whose manifest names the digest of a layer of a's that this registry does not have."""
    secret = private(seed)
    world.pull("a", publish(theirs, secret, f"{seed}/private"))
    base = mine.add_blob(secret.layers[0].blob)
    descriptors = [base, secret.layers[1].descriptor()]
    named = publish_manifest(mine, f"{seed}/named", descriptors, [str(layer.diff_id) for layer in secret.layers])
    world.pull("b", named)
    return world.read("b", named, "/secret")


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running
        running.go_on.set()


@pytest.fixture
def other() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def run(directory: str, settings: dict[str, str]) -> contextlib.AbstractContextManager[Node]:
    return run_node(directory, NEWER, plugins=("nsfs-a", "nsfs-b"), settings=settings)


@pytest.fixture(scope="module", params=["isolated", "shared"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """In each scope that layers of images can have; with time to find out a lie at the pull, also on a busy machine."""
    settings = {"isolation": request.param, "prepare_wait": "5s"}
    with run(str(tmp_path_factory.mktemp("node")), settings) as running:
        yield running


isolated = pytest.mark.parametrize("node", ["isolated"], indirect=True)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    settings = {"prepare": "strict", "prepare_wait": "10s"}
    with run(str(tmp_path_factory.mktemp("node")), settings) as running:
        yield running


@pytest.mark.parametrize("kind", FORMATS)
def test_the_attacks_work_where_everything_is_believed(registry: FakeRegistry, other: FakeRegistry, kind: str) -> None:
    assert steal(Naive([registry]), registry, kind, "steal") == SECRET
    assert poison(Naive([registry]), registry, kind, "poison") == POISON
    assert name_blobs(Naive([registry, other]), other, registry, "named") == SECRET


@pytest.mark.parametrize("seats", [APART, NAMED], ids=["namespaces", "plugin-names"])
def test_nobody_steals_by_diff_ids(node: Node, registry: FakeRegistry, seats: dict[str, tuple[str, str]]) -> None:
    world = Tenants(node.containerd, seats)
    seed = seats["a"][1]
    with pytest.raises(RefusedError, match=r"wrong diff id|diff ID"):
        steal(world, registry, "plain", f"steal-plain-{seed}")
    assert steal(world, registry, "estargz", f"steal-estargz-{seed}") == OWN


@pytest.mark.parametrize("seats", [APART, NAMED], ids=["namespaces", "plugin-names"])
@pytest.mark.parametrize("kind", FORMATS)
def test_nobody_poisons_by_being_first(
    node: Node, registry: FakeRegistry, seats: dict[str, tuple[str, str]], kind: str
) -> None:
    assert poison(Tenants(node.containerd, seats), registry, kind, f"poison-{kind}-{seats['a'][1]}") == GENUINE


@isolated
def test_nobody_reads_blobs_by_naming_them(node: Node, registry: FakeRegistry, other: FakeRegistry) -> None:
    assert name_blobs(Tenants(node.containerd, OVERLAYFS), other, registry, "over") == SECRET
    with pytest.raises(RefusedError, match="not found"):
        name_blobs(Tenants(node.containerd, APART), other, registry, "apart")


def test_containerd_can_be_told_to_share_no_blobs(registry: FakeRegistry, other: FakeRegistry, tmp_path: Path) -> None:
    """As the threat model says: its content store is not ours."""
    policy = '[plugins."io.containerd.metadata.v1.bolt"]\n  content_sharing_policy = "isolated"\n'
    with (
        run_containerd(str(tmp_path), release=NEWER, more=policy) as containerd,
        pytest.raises(RefusedError, match="not found"),
    ):
        name_blobs(Tenants(containerd, OVERLAYFS), other, registry, "over")


@isolated
def test_what_nothing_tells_apart_is_containerds_to_share(node: Node, registry: FakeRegistry) -> None:
    """containerd does not ask for a chain that a namespace has through that plugin name: nsfs is not even told."""
    world = Tenants(node.containerd, TOGETHER)
    assert steal(world, registry, "plain", "together") == SECRET
    assert poison(world, registry, "estargz", "together-poison") == POISON


@isolated
def test_together_a_plain_layer_is_not_poisoned(node: Node, registry: FakeRegistry) -> None:
    assert poison(Tenants(node.containerd, TOGETHER), registry, "plain", "together-plain") == GENUINE


@isolated
def test_together_a_plain_layer_that_comes_late_is_not_poisoned(node: Node, registry: FakeRegistry) -> None:
    """b's pull ends before the lie can be known; then nobody starts a container on it, and is told why."""
    real = public("late")
    forged = pretending(real, own_layer("plain", "tool", POISON))
    registry.script, registry.faults_on = "H", str(forged.layers[1].digest)
    world = Tenants(node.containerd, TOGETHER)
    lie = publish(registry, forged, "late/forged")
    world.pull("b", lie)
    genuine = publish(registry, real, "late/public")
    world.pull("a", genuine)
    registry.go_on.set()
    for tenant, reference in (("b", lie), ("a", genuine)):
        with pytest.raises(RefusedError, match="diff ID"):
            world.read(tenant, reference, "/tool")


@pytest.mark.parametrize("kind", FORMATS)
def test_strict_lets_nothing_be_poisoned(strict: Node, registry: FakeRegistry, kind: str) -> None:
    assert poison(Tenants(strict.containerd, TOGETHER), registry, kind, f"strict-{kind}") == GENUINE
