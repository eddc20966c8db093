"""docker's config.json and credential helpers, with helpers that are real programs."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from nsfs.errors import DeniedError, UsageError
from nsfs.remote.credentials import Anonymous, Credential, DockerConfig, FirstOf, parse_auths, plan_helper

if TYPE_CHECKING:
    from pathlib import Path


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def write(tmp_path: Path, config: object) -> str:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def install(tmp_path: Path, name: str, script: str) -> None:
    path = tmp_path / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def lookup(tmp_path: Path, config: object, host: str, timeout: float = 10.0) -> Credential | None:
    path = write(tmp_path, config)
    found = DockerConfig(path, helper_timeout=timeout, helper_path=f"{tmp_path}:/usr/bin:/bin")
    return trio.run(found.lookup, host, "team/app")


class TestAuths:
    @pytest.mark.parametrize(
        ("key", "host"),
        [
            ("a.example", "a.example"),
            ("A.example", "a.example"),
            ("https://a.example", "a.example"),
            ("https://a.example/v1/", "a.example"),
            ("a.example:5000", "a.example:5000"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("https://index.docker.io/v1/", "registry-1.docker.io"),
            ("docker.io", "docker.io"),
        ],
    )
    def test_keys_of_old_and_new(self, key: str, host: str) -> None:
        found = parse_auths({"auths": {key: {"auth": encoded("ann:p:w")}}}, host)
        assert found == Credential("ann", "p:w")

    def test_a_host_is_not_its_neighbour(self) -> None:
        config = {"auths": {"a.example": {"auth": encoded("ann:x")}}}
        for host in ("b.example", "a.example:5000", "x.a.example", "a.example.evil"):
            assert parse_auths(config, host) is None

    def test_the_exact_key_wins(self) -> None:
        config = {
            "auths": {"a.example": {"auth": encoded("new:x")}, "https://a.example/v1/": {"auth": encoded("old:x")}}
        }
        found = parse_auths(config, "a.example")
        assert found is not None
        assert found.username == "new"

    def test_other_spellings(self) -> None:
        assert parse_auths({"auths": {"a": {"username": "u", "password": "p"}}}, "a") == Credential("u", "p")
        token = parse_auths({"auths": {"a": {"identitytoken": "t"}}}, "a")
        assert token == Credential("", "", "t")
        assert parse_auths({"auths": {"a": {}}}, "a") is None

    @pytest.mark.parametrize("auth", ["!!!", encoded("nocolon"), "\N{SNOWMAN}"])
    def test_malformed(self, auth: str) -> None:
        with pytest.raises(UsageError, match="malformed"):
            parse_auths({"auths": {"a": {"auth": auth}}}, "a")

    @pytest.mark.parametrize(
        "config", [{}, {"auths": None}, {"auths": []}, {"auths": {"a": None}}, {"auths": {"a": 3}}]
    )
    def test_nobody(self, config: dict[str, Any]) -> None:
        assert parse_auths(config, "a") is None


class TestFile:
    def test_missing(self, tmp_path: Path) -> None:
        assert trio.run(DockerConfig(str(tmp_path / "none")).lookup, "a", "b") is None
        assert trio.run(Anonymous().lookup, "a", "b") is None

    @pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
    def test_malformed(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(UsageError, match="malformed docker configuration"):
            lookup(tmp_path, text, "a")


class Knows:
    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        return Credential(self.hosts[0]) if host in self.hosts else None


def test_the_first_that_knows_a_host_is_asked() -> None:
    several = FirstOf([Knows("a"), Knows("b", "a"), Anonymous()])
    assert trio.run(several.lookup, "a", "x") == Credential("a")
    assert trio.run(several.lookup, "b", "x") == Credential("b")
    assert trio.run(several.lookup, "c", "x") is None


class TestHelpers:
    def test_order(self) -> None:
        config = {"credHelpers": {"a.example": "one", "docker.io": "hub"}, "credsStore": "all"}
        assert plan_helper(config, "a.example") == "one"
        assert plan_helper(config, "registry-1.docker.io") == "hub"
        assert plan_helper(config, "b.example") == "all"
        assert plan_helper({}, "a.example") is None

    @pytest.mark.parametrize("name", ["../x", "a/b", "-x", "a b", 3, "x;y"])
    def test_names_that_are_no_programs(self, name: object) -> None:
        with pytest.raises(UsageError):
            plan_helper({"credsStore": name}, "a")

    def test_password(self, tmp_path: Path) -> None:
        install(
            tmp_path,
            "good",
            'read s; test "$1" = get && printf \'{"ServerURL":"%s","Username":"u","Secret":"%s"}\' x "$s"',
        )
        assert lookup(tmp_path, {"credsStore": "good"}, "a.example") == Credential("u", "a.example")
        assert lookup(tmp_path, {"credsStore": "good"}, "docker.io") == Credential("u", "https://index.docker.io/v1/")

    def test_identity_token(self, tmp_path: Path) -> None:
        install(tmp_path, "good", 'printf \'{"Username":"<token>","Secret":"t"}\'')
        assert lookup(tmp_path, {"credsStore": "good"}, "a") == Credential("", identity_token="t")

    def test_it_knows_nothing(self, tmp_path: Path) -> None:
        install(tmp_path, "none", "echo credentials not found in native keychain; exit 1")
        assert lookup(tmp_path, {"credsStore": "none"}, "a") is None

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            ("echo hunter2; exit 3", "exit status 3"),
            ("echo hunter2", "something else than JSON"),
            ("sleep 60", "does not answer"),
        ],
    )
    def test_it_fails_and_is_not_quoted(self, tmp_path: Path, script: str, reason: str) -> None:
        install(tmp_path, "bad", script)
        with pytest.raises(DeniedError, match=reason) as caught:
            lookup(tmp_path, {"credsStore": "bad"}, "a", timeout=0.5)
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize("mode", [0o666, 0o664])
    def test_a_file_that_others_may_write_names_none(self, tmp_path: Path, mode: int) -> None:
        install(tmp_path, "evil", f"touch {tmp_path}/ran")
        path = write(tmp_path, {"credsStore": "evil"})
        os.chmod(path, mode)
        with pytest.raises(DeniedError, match="others may write"):
            trio.run(DockerConfig(path, helper_path=f"{tmp_path}:/usr/bin:/bin").lookup, "a", "b")
        assert not (tmp_path / "ran").exists()

    def test_it_is_not_installed(self, tmp_path: Path) -> None:
        with pytest.raises(DeniedError, match="not installed"):
            lookup(tmp_path, {"credsStore": "nowhere"}, "a")
