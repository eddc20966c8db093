"""Logging in: tried at a registry, kept in a file as docker keeps it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fakes import PASSWORD, USER, FakeRegistry
from nsfs.errors import DeniedError, NotFoundError, UnreachableError, UnsupportedError, UsageError
from nsfs.remote.credentials import Credential, DockerConfig
from nsfs.remote.hosts import HostsDirectory
from nsfs.remote.logins import drop_login, parse_registry, put_login, try_login
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from pathlib import Path

ANN = Credential(USER, PASSWORD)


def lookup(path: str, host: str) -> Credential | None:
    return trio.run(DockerConfig(path).lookup, host, "x")


def tried(registry: FakeRegistry, credential: Credential) -> None:
    trio.run(try_login, registry.host, credential, HostsDirectory(None), Timeouts(5, 5))


@pytest.mark.parametrize("auth", ["basic", "token"])
def test_only_what_the_registry_accepts(auth: str) -> None:
    with FakeRegistry(auth=auth) as registry:
        registry.documents["/v2/"] = (b"{}", "application/json")
        tried(registry, ANN)
        with pytest.raises(DeniedError):
            tried(registry, Credential(USER, "wrong"))
    with pytest.raises(UnreachableError):
        tried(registry, ANN)


def test_it_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "team-a" / "config.json")
    put_login(path, "a.example:5000", ANN)
    put_login(path, "docker.io", Credential("hub", "p:w"))
    put_login(path, "a.example:5000", Credential(USER, "newer"))
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(tmp_path / "team-a").st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "team-a") == ["config.json"]
    assert lookup(path, "a.example:5000") == Credential(USER, "newer")
    assert lookup(path, "docker.io") == Credential("hub", "p:w")
    assert lookup(path, "a.example") is None
    drop_login(path, "a.example:5000")
    assert lookup(path, "a.example:5000") is None
    assert lookup(path, "docker.io") is not None
    with pytest.raises(NotFoundError):
        drop_login(path, "a.example:5000")


def test_what_else_is_in_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps({"auths": {"https://a.example/v1/": {"auth": "x"}, "b": {}}, "psFormat": "x"}))
    os.chown(path, 1234, 1234)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    put_login(str(link), "a.example", ANN)
    config: dict[str, Any] = json.loads(path.read_text())
    assert config["psFormat"] == "x"
    assert sorted(config["auths"]) == ["a.example", "b"]
    assert link.is_symlink()
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (1234, 0o600)


def test_where_a_helper_has_the_say_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"credsStore": "vault"}')
    with pytest.raises(UnsupportedError, match="docker-credential-vault"):
        put_login(str(path), "a.example", ANN)
    assert path.read_text() == '{"credsStore": "vault"}'


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("a.example", "a.example"),
        ("https://a.example/", "a.example"),
        ("A.example:5000", "a.example:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("localhost", "localhost"),
    ],
)
def test_names_of_registries(text: str, host: str) -> None:
    assert parse_registry(text) == host


@pytest.mark.parametrize("text", ["", "a b", "nodots", "a.example:x", "-a.example", "oci:x", "../x"])
def test_what_is_no_registry(text: str) -> None:
    with pytest.raises(UsageError, match="not a registry"):
        parse_registry(text)
