"""A domain that several namespaces share: nobody gets of it what its own registry does not give it.

The demonstration of 2019, in which a tenant's manifest names the digests of another's private layers, is tried in each
form that a tenant has: on a registry of its own, on one that lies, and on the victim's. Each attack is first shown to
work on a daemon whose grants are switched off (`naive`), which only a test can do.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from fakes import OCI_GZIP, FakeRegistry
from images import Image, file, gzip_layer
from mounting import swept
from nsfs.serve import mounts
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish, publish_manifest
from users import noise, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SECRET = noise(30_000, 1)
A, B = "team-a:alpha", "team-b:beta"
"""Who may, as the registry knows them: namespace and password."""
SCOPE = ("--isolation", "shared")

_NAIVE = """
    import nsfs.core.grants, nsfs.model.pool

    async def admit(self, image):
        pass

    nsfs.core.grants.Grants.admit = admit
    nsfs.model.pool.origin_of = lambda registry, network="": "0" * 16
"""


def put(registry: FakeRegistry, image: Image, name: str, *owners: str) -> str:
    """Publish an image into a repository that `owners` may pull from, and that has these blobs alone."""
    reference = publish(registry, image, name)
    registry.members.setdefault(name, set()).update(str(entry["digest"]) for entry in descriptors(registry, name))
    for owner in owners:
        registry.rights.setdefault(owner, set()).add(name)
    return reference


def descriptors(registry: FakeRegistry, name: str) -> list[dict[str, Any]]:
    manifest = json.loads(registry.documents[f"/v2/{name}/manifests/latest"][0])
    return [manifest["config"], *manifest["layers"]]


def authorization(owner: str) -> str:
    return "Basic " + base64.b64encode(owner.encode()).decode()


class Tenants:
    """Two namespaces with credentials of their own, and a registry that knows them."""

    def __init__(self, daemon: Daemon, registry: FakeRegistry) -> None:
        self.daemon = daemon
        self.registry = registry

    def look(self, owner: str, reference: str, path: str = "/secret", command: str = "cat") -> tuple[int, str]:
        """Exit code, and what is on stdout, or else on stderr."""
        namespace = owner.partition(":")[0]
        done = self.daemon.nsfs(command, f"{reference}:{path}", "--namespace", namespace, *SCOPE, check=False)
        return done.returncode, done.stdout if done.returncode == 0 else done.stderr


@contextlib.contextmanager
def run_tenants(directory: Path, **settings: Any) -> Iterator[Tenants]:
    with FakeRegistry(auth="basic") as registry:
        registry.rights = {A: set(), B: set()}
        for owner in (A, B):
            auth = {"auth": base64.b64encode(owner.encode()).decode()}
            (directory / f"{owner.partition(':')[0]}.json").write_text(json.dumps({"auths": {registry.host: auth}}))
        namespaces = {
            f"namespace.{owner.partition(':')[0]}": {"docker_config": f"{directory}/{owner.partition(':')[0]}.json"}
            for owner in (A, B)
        }
        usual = {"log_level": "debug", "fetch": {"read_ahead": 0}}
        with run_daemon(str(directory / "daemon"), {**usual, **settings, **namespaces}) as daemon:
            yield Tenants(daemon, registry)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Path]:
    """A place for mounts, swept when its test ends."""
    with swept(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    with run_tenants(tmp_path_factory.mktemp("tenants")) as running:
        yield running


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """Without grants: a test's own module takes them out of every process of the daemon when it starts."""
    directory, modules = tmp_path_factory.mktemp("naive"), tmp_path_factory.mktemp("modules")
    (modules / "sitecustomize.py").write_text(textwrap.dedent(_NAIVE))
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(modules), prepend=":")
            running = stack.enter_context(run_tenants(directory))
        yield running


# What b does; each gives what b hears


def own_registry(tenants: Tenants, seed: str, digest: str, size: int, diff_id: str) -> tuple[int, str]:
    """b runs a registry, whose manifest names a digest of a's that this registry does not have."""
    with FakeRegistry() as mine:
        name = f"b/{seed}"
        layer = {"mediaType": OCI_GZIP, "digest": digest, "size": size}
        return tenants.look(B, publish_manifest(mine, name, [layer], [diff_id]))


def lying_registry(tenants: Tenants, seed: str, digest: str, size: int, diff_id: str) -> tuple[int, str]:
    """As before, and the registry says that it has it."""
    with FakeRegistry(lies=True, claimed=size) as mine:
        layer = {"mediaType": OCI_GZIP, "digest": digest, "size": size}
        reference = publish_manifest(mine, f"b/{seed}", [layer], [diff_id])
        (config,) = [each for each in descriptors(mine, f"b/{seed}") if each["digest"] != digest]
        mine.honest = {str(config["digest"])}
        return tenants.look(B, reference)


def victims_registry(tenants: Tenants, seed: str, digest: str, size: int, diff_id: str) -> tuple[int, str]:
    """b pushes a manifest to a repository of its own, on the registry that has a's, which knows better."""
    name = f"b/{seed}"
    layer = {"mediaType": OCI_GZIP, "digest": digest, "size": size}
    reference = publish_manifest(tenants.registry, name, [layer], [diff_id])
    tenants.registry.rights[B].add(name)
    tenants.registry.members[name] = {str(descriptors(tenants.registry, name)[0]["digest"])}
    return tenants.look(B, reference)


ATTACKS = (own_registry, lying_registry, victims_registry)


def attack(tenants: Tenants, by: Callable[..., tuple[int, str]], seed: str, *, is_there: bool) -> tuple[int, str]:
    """What b hears of a layer that the domain has, from a, or that nobody ever had."""
    layer = gzip_layer([file("secret", SECRET + seed.encode()), file("there", b"%d" % is_there)])
    if is_there:
        mine = put(tenants.registry, Image((layer,)), f"a/{seed}", A)
        code, _ = tenants.look(A, mine, command="stat")
        assert code == 0
    return by(
        tenants, f"{seed}-{'there' if is_there else 'absent'}", str(layer.digest), len(layer.blob), str(layer.diff_id)
    )


@pytest.mark.parametrize("by", ATTACKS)
def test_without_grants_a_digest_is_enough(naive: Tenants, by: Callable[..., tuple[int, str]]) -> None:
    layer = gzip_layer([file("secret", f"secret of {by.__name__}".encode())])
    mine = put(naive.registry, Image((layer,)), f"a/{by.__name__}", A)
    assert naive.look(A, mine)[0] == 0
    said = by(naive, by.__name__, str(layer.digest), len(layer.blob), str(layer.diff_id))
    assert said == (0, f"secret of {by.__name__}")


@pytest.mark.parametrize("by", ATTACKS)
def test_naming_a_digest_gives_nothing_and_tells_nothing(tenants: Tenants, by: Callable[..., tuple[int, str]]) -> None:
    """Of a layer that a has b hears exactly what b hears of one that nobody has."""
    there = attack(tenants, by, by.__name__, is_there=True)
    absent = attack(tenants, by, by.__name__, is_there=False)
    assert there[0] == absent[0] != 0, (there, absent)
    assert blurred(there[1]) == blurred(absent[1])


def blurred(text: str) -> str:
    """Without what differs between any two images."""
    return re.sub(r"[0-9a-f]{12,}|127\.0\.0\.1:\d+|-(there|absent)|\d+ B", "*", text)


def test_a_repository_of_a_s_is_a_s(tenants: Tenants) -> None:
    mine = put(tenants.registry, Image((gzip_layer([file("secret", b"a's")]),)), "a/straight", A)
    assert tenants.look(A, mine) == (0, "a's")
    assert tenants.look(B, mine)[0] == 4
    for command in ("stat", "tree"):
        assert tenants.look(B, mine, command=command)[0] == 4
    assert tenants.daemon.nsfs("inspect", mine, "--namespace", "team-b", *SCOPE, check=False).returncode == 4


def test_one_reference_and_two_secrets_at_the_same_moment(tenants: Tenants) -> None:
    heard: dict[str, list[tuple[int, str]]] = {A: [], B: []}
    for number in range(3):
        image = Image((gzip_layer([file("secret", b"for a alone %d" % number)]),))
        mine = put(tenants.registry, image, f"a/both-{number}", A)

        def look(owner: str, reference: str = mine) -> None:
            heard[owner].append(tenants.look(owner, reference))

        threads = [threading.Thread(target=look, args=(owner,)) for owner in (A, B, A, B)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {code for code, _ in heard[A]} == {0}
    assert all(text.startswith("for a alone") for _, text in heard[A])
    assert {code for code, _ in heard[B]} == {4}


def test_who_may_pays_nothing_for_what_is_there_and_each_for_what_it_fetches(tenants: Tenants, arena: Path) -> None:
    """Of a layer that is fetched by ranges each range is asked for as the one who reads it."""
    parts = {name: noise(150_000, seed) for name, seed in (("one", 2), ("two", 3))}
    layer = estargz_layer([file(name, data) for name, data in parts.items()], chunk_size=1 << 20)
    reference = put(tenants.registry, Image((layer,)), "both/lazy", A, B)
    names = {owner: ("--namespace", owner.partition(":")[0], *SCOPE) for owner in (A, B)}
    one, two = str(arena / "one"), str(arena / "two")
    with (
        tenants.daemon.mounted(reference, one, *names[A]),
        tenants.daemon.mounted(reference, two, *names[B]),
    ):
        assert not lowers_of(one) & lowers_of(two), "what is absent is asked for as the one who reads it"
        before = len(tenants.registry.log)
        assert read(f"{one}/one") == read(f"{two}/one") == parts["one"]
        asked = [entry.headers["authorization"] for entry in tenants.registry.log[before:]]
        assert set(asked) == {authorization(A)}
        before = len(tenants.registry.log)
        assert read(f"{two}/two") == read(f"{one}/two") == parts["two"]
        asked = [entry.headers["authorization"] for entry in tenants.registry.log[before:]]
        assert set(asked) == {authorization(B)}


def test_workers_that_die_are_reached_anew(tenants: Tenants, arena: Path) -> None:
    """A relay ends with either of its workers; reads go on over another one."""
    parts = {name: noise(150_000, seed) for name, seed in (("one", 12), ("two", 13), ("three", 14))}
    layer = estargz_layer([file(name, data) for name, data in parts.items()], chunk_size=1 << 20)
    reference = put(tenants.registry, Image((layer,)), "a/dying", A)
    with tenants.daemon.mounted(reference, str(arena / "mnt"), "--namespace", "team-a", *SCOPE):
        assert read(arena / "mnt/one") == parts["one"]
        for domain, name in (("ns/team-a", "two"), ("shared", "three")):
            os.kill(tenants.daemon.workers()[domain], signal.SIGKILL)
            assert read(arena / f"mnt/{name}") == parts[name]


def lowers_of(target: str) -> set[str]:
    """What is stacked, or bound, at `target`, by device."""
    found = mounts.find_mount(target)
    if found.fstype != "overlay":
        return {str(found.device)}
    (lowers,) = [option for option in found.super_options.split(",") if option.startswith("lowerdir")]
    return set(lowers.partition("=")[2].split(":"))


def test_a_base_that_is_complete_has_its_pages_once(tenants: Tenants, arena: Path) -> None:
    base = gzip_layer([file("base", noise(200_000, 4))])
    references = [
        put(tenants.registry, Image((base, gzip_layer([file("own", owner.encode())]))), f"{owner[:6]}/on-base", owner)
        for owner in (A, B)
    ]
    one, two = str(arena / "one"), str(arena / "two")
    with (
        tenants.daemon.mounted(references[0], one, "--namespace", "team-a", *SCOPE),
        tenants.daemon.mounted(references[1], two, "--namespace", "team-b", *SCOPE),
    ):
        assert len(lowers_of(one) & lowers_of(two)) == 1
        assert read(f"{one}/base") == read(f"{two}/base")


def test_a_grant_ends(tmp_path_factory: pytest.TempPathFactory, arena: Path) -> None:
    """Access that was taken away counts until the grant ends, and no longer; mounts that are there stay."""
    with run_tenants(tmp_path_factory.mktemp("ending"), grant_ttl="3s") as tenants:
        registry = tenants.registry
        layer = estargz_layer([file("secret", SECRET), file("later", noise(150_000, 5))], chunk_size=1 << 20)
        reference = put(registry, Image((layer,)), "b/mine", B)
        names = ("--namespace", "team-b", *SCOPE)
        with tenants.daemon.mounted(reference, str(arena / "mnt"), *names):
            assert read(arena / "mnt/secret") == SECRET
            granted = time.monotonic()
            registry.members["b/mine"].discard(str(layer.digest))
            early = tenants.look(B, reference, command="stat")
            assert early[0] == 0 or time.monotonic() > granted + 2, early
            time.sleep(max(0.0, granted + 3.5 - time.monotonic()))
            code, said = tenants.look(B, reference, command="stat")
            assert (code, "blob unknown" in said) == (3, True), said
            assert read(arena / "mnt/secret") == SECRET
            with pytest.raises(OSError, match="error"):
                read(arena / "mnt/later")
            registry.members["b/mine"].add(str(layer.digest))
            assert tenants.look(B, reference, command="stat")[0] == 0
        registry.rights[B].clear()
        assert tenants.look(B, reference, command="stat")[0] == 4


def test_nobody_is_asked_on_whose_behalf_nobody_came(tenants: Tenants) -> None:
    """The own worker of a namespace is started for the shared domain, as soon as that namespace is there."""
    owners: Sequence[str] = sorted(name for name in tenants.daemon.workers() if name.startswith("ns/"))
    assert owners == ["ns/team-a", "ns/team-b"]
