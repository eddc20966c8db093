"""Whoever a registry, a manifest or a tenant sends us to: no credential goes to a host that it is not for.

The canary is a host of the attacker's, which remembers what it was told and asks for more. Each attack is carried out
first by a client that takes its credential along wherever it is sent.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from fakes import PASSWORD, USER, FakeRegistry, basic
from images import OCI_MANIFEST, Image, file, gzip_layer
from mounting import swept
from nsfs.model.digest import Digest
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish, publish_manifest
from users import noise, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LAYER = gzip_layer([file("f", b"content")])
_NO_PROXY = urllib.request.ProxyHandler({})


class Client(Protocol):
    """Gets an image from a registry that it has a credential for."""

    def get(self, registry: FakeRegistry, name: str, mirror: str = "") -> None:
        """All of it; `mirror` is asked first. Nothing is raised where that fails."""


@dataclass
class Obliging:
    """Takes its credential wherever it is sent: to redirects, to `urls`, to mirrors, to whoever says 401."""

    credential: str = basic()

    def get(self, registry: FakeRegistry, name: str, mirror: str = "") -> None:
        host = mirror or registry.host
        with contextlib.suppress(OSError):
            manifest = self._fetch(f"http://{host}/v2/{name}/manifests/latest")
            for layer in manifest.get("layers", []):
                self._fetch(layer.get("urls", [f"http://{host}/v2/{name}/blobs/{layer['digest']}"])[0])

    def _fetch(self, url: str) -> dict[str, Any]:
        request = urllib.request.Request(url, headers={"Authorization": self.credential})
        try:
            with urllib.request.build_opener(_NO_PROXY).open(request) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            realm = re.search(r'realm="(http[^"]+)"', error.headers["WWW-Authenticate"] or "")
            if realm is None:
                raise
            return self._fetch(f"{realm[1]}?scope=repository:team/app:pull")
        found: dict[str, Any] = json.loads(body) if body.startswith(b"{") else {}
        return found


@dataclass
class Nsfs:
    """The daemon, with the credential in its docker configuration and mirrors in hosts.toml."""

    directory: Path

    def get(self, registry: FakeRegistry, name: str, mirror: str = "") -> None:
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (self.directory / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        if mirror:
            hosts = self.directory / registry.host
            hosts.mkdir()
            (hosts / "hosts.toml").write_text(f'server = "http://{registry.host}"\n[host."http://{mirror}"]\n')
        with self._running() as daemon:
            daemon.nsfs("cat", f"{registry.host}/{name}:/f", check=False)

    def _running(self) -> contextlib.AbstractContextManager[Daemon]:
        keys = {"docker_config": str(self.directory / "config.json"), "config_path": str(self.directory)}
        return run_daemon(str(self.directory / "d"), {"registry": keys})


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """The one that the credential is for."""
    with FakeRegistry(auth="basic") as running:
        yield running


@pytest.fixture
def canary() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def redirect(client: Client, registry: FakeRegistry, canary: FakeRegistry) -> None:
    """Blobs are said to be at the canary, which asks who is there."""
    canary.add_blob(LAYER.blob)
    canary.auth = "basic"
    publish(registry, Image((LAYER,)), "team/app")
    registry.redirect_to = f"http://{canary.host}/v2/team/app/blobs/{LAYER.digest}"
    client.get(registry, "team/app")


def urls(client: Client, registry: FakeRegistry, canary: FakeRegistry) -> None:
    """A descriptor says where else its blob is (OCI image-spec 1.1, descriptor.md, `urls`)."""
    canary.add_blob(LAYER.blob)
    elsewhere = {"urls": [f"http://{canary.host}/v2/team/app/blobs/{LAYER.digest}"]}
    publish_manifest(registry, "team/app", [LAYER.descriptor() | elsewhere], [str(LAYER.diff_id)])
    client.get(registry, "team/app")


def mirror(client: Client, registry: FakeRegistry, canary: FakeRegistry) -> None:
    """A mirror has the image, and wants a password."""
    publish(registry, Image((LAYER,)), "team/app")
    publish(canary, Image((LAYER,)), "team/app")
    canary.auth = "basic"
    client.get(registry, "team/app", canary.host)


def other_mirror(client: Client, registry: FakeRegistry, canary: FakeRegistry) -> None:
    """A mirror wants a token, from a server of its own."""
    publish(registry, Image((LAYER,)), "team/app")
    publish(canary, Image((LAYER,)), "team/app")
    canary.auth = "token"
    client.get(registry, "team/app", canary.host)


def realm(client: Client, registry: FakeRegistry, canary: FakeRegistry) -> None:
    """The host that blobs are redirected to says that tokens for the registry are to be had from it."""
    canary.add_blob(LAYER.blob)
    service = f'service="{registry.host}",scope="repository:team/app:pull"'
    canary.challenge = f'Bearer realm="http://{canary.host_of("token")}/token",{service}'
    publish(registry, Image((LAYER,)), "team/app")
    registry.redirect_to = f"http://{canary.host}/v2/team/app/blobs/{LAYER.digest}"
    client.get(registry, "team/app")


ATTACKS = [redirect, urls, mirror, other_mirror, realm]


class TwoFaced(FakeRegistry):
    """Has another image under the same reference for each user, and none for others."""

    def __init__(self, users: Mapping[str, Image]) -> None:
        super().__init__(auth="basic")
        self._manifests = {header_of(user): image.manifest for user, image in users.items()}
        for image in users.values():
            for blob in image.blobs():
                self.add_blob(blob)

    def lets_in(self, authorization: str | None, path: str) -> bool:
        return authorization in self._manifests

    def find_document(self, path: str, authorization: str | None) -> tuple[bytes, str] | None:
        if path == "/v2/team/app/manifests/latest":
            return self._manifests[authorization or ""], OCI_MANIFEST
        known = {f"/v2/team/app/manifests/{Digest.of(manifest)}": manifest for manifest in self._manifests.values()}
        return (known[path], OCI_MANIFEST) if path in known else None


def header_of(user: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{user}".encode()).decode()


@dataclass
class Keychain:
    """Remembers a reference's secret, as it was given last."""

    _secrets: dict[str, str]

    def log_in(self, reference: str, user: str) -> None:
        self._secrets[reference] = header_of(user)

    def read(self, registry: FakeRegistry) -> bytes:
        reference = f"{registry.host}/team/app:latest"
        manifest = Obliging(self._secrets[reference])._fetch(f"http://{registry.host}/v2/team/app/manifests/latest")
        blob = registry.blobs[manifest["layers"][0]["digest"]]
        return zlib.decompress(blob, 31)


def test_two_secrets_for_one_reference_do_not_meet(tmp_path: Path) -> None:
    """At the same moment, of one registry: each namespace sees what its own secret shows, and a wrong one nothing."""
    images = {user: Image((gzip_layer([file("f", f"for {user}".encode())]),)) for user in ("ann", "bob")}
    with TwoFaced(images) as registry:
        reference = f"{registry.host}/team/app:latest"
        keychain = Keychain({})
        for user in images:
            keychain.log_in(reference, user)
        assert b"for bob" in keychain.read(registry), "which is what ann sees, too"
        tables = {f"namespace.team-{user}": _log_in(tmp_path, registry, user) for user in ("ann", "bob", "eve")}
        with run_daemon(str(tmp_path / "d"), tables) as daemon, ThreadPoolExecutor(6) as pool:

            def read(user: str) -> str:
                done = daemon.nsfs("cat", f"{reference}:/f", "--namespace", f"team-{user}", check=False)
                return done.stdout or str(done.returncode)

            users = ("ann", "bob", "eve") * 4
            assert list(pool.map(read, users)) == ["for ann", "for bob", "4"] * 4


def test_who_lost_access_gets_nothing_that_is_not_there(tmp_path: Path) -> None:
    """In a domain of one's own: the mount stays with what it has, and whoever names the image anew is refused."""
    layer = estargz_layer([file("seen", noise(30_000, 1)), file("later", noise(150_000, 5))], chunk_size=1 << 20)
    with swept(tmp_path), FakeRegistry(auth="basic") as registry:
        registry.rights = {"ann:ann": {"team/app"}}
        reference = publish(registry, Image((layer,)), "team/app")
        settings = {"fetch": {"read_ahead": 0}, "namespace.team": _log_in(tmp_path, registry, "ann")}
        scope = ("--namespace", "team")
        with (
            run_daemon(str(tmp_path / "d"), settings) as daemon,
            daemon.mounted(reference, str(tmp_path / "mnt"), *scope),
        ):
            assert read(tmp_path / "mnt/seen") == noise(30_000, 1)
            registry.rights["ann:ann"].clear()
            with pytest.raises(OSError, match="error"):
                read(tmp_path / "mnt/later")
            for command in ("stat", "cat"):
                refused = daemon.nsfs(command, f"{reference}:/seen", *scope, check=False)
                assert refused.returncode == 4, refused.stderr
            (tmp_path / "again").mkdir()
            assert daemon.nsfs("mount", reference, str(tmp_path / "again"), *scope, check=False).returncode == 4
            assert read(tmp_path / "mnt/seen") == noise(30_000, 1)


def _log_in(directory: Path, registry: FakeRegistry, user: str) -> dict[str, str]:
    """The namespace's table of the configuration."""
    path = directory / f"{user}.json"
    path.write_text(json.dumps({"auths": {registry.host: {"auth": header_of(user).removeprefix("Basic ")}}}))
    path.chmod(0o600)
    return {"docker_config": str(path)}


def told(canary: FakeRegistry) -> list[Mapping[str, str]]:
    """Requests at the canary with a credential in them, whatever the header."""
    secrets = (PASSWORD, basic(), basic().removeprefix("Basic "))
    return [one.headers for one in canary.log if any(secret in f"{one.headers} {one.path}" for secret in secrets)]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack.__name__))
def test_a_credential_stays_with_its_host(
    attack: Callable[[Client, FakeRegistry, FakeRegistry], None],
    registry: FakeRegistry,
    canary: FakeRegistry,
    tmp_path: Path,
) -> None:
    with FakeRegistry(auth="basic") as naive, FakeRegistry() as hearing:
        attack(Obliging(), naive, hearing)
        assert told(hearing)
    attack(Nsfs(tmp_path), registry, canary)
    used = any(entry.headers.get("authorization") == basic() for entry in registry.log)
    assert used is (attack is not other_mirror), "that one lets in whoever asks for a token as nobody"
    assert told(canary) == []
    assert bool(canary.log) is (attack is not urls), "nobody asks there because of what a descriptor says"
