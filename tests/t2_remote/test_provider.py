"""Credential providers: programs that speak the kubelet's protocol, here small real ones."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from nsfs.errors import DeniedError
from nsfs.remote.provider import VERSION, ExecProvider, matches, parse_response

if TYPE_CHECKING:
    from pathlib import Path

    from nsfs.remote.credentials import Credential


def response(**more: Any) -> dict[str, Any]:
    login = {"username": "u", "password": "hunter2"}
    usual = {"cacheKeyType": "Registry", "cacheDuration": "1h", "auth": {"a.example": login}}
    return {"apiVersion": VERSION, "kind": "CredentialProviderResponse", **usual, **more}


def install(path: Path, answer: object) -> str:
    """A program that writes down what it is asked, and answers."""
    (path / "answer").write_text(json.dumps(answer))
    program = path / "provider"
    program.write_text(
        f'#!/bin/sh\ncat >> {path}/asked; echo >> {path}/asked; echo "$NSFS_NAMESPACE $1" > {path}/told\n'
        f"cat {path}/answer\n"
    )
    program.chmod(0o755)
    return str(program)


def asked(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (path / "asked").read_text().splitlines()]


def test_what_is_said_and_heard(tmp_path: Path) -> None:
    provider = ExecProvider((install(tmp_path, response()), "get"), {"NSFS_NAMESPACE": "team-a"})
    found = trio.run(provider.lookup, "a.example", "team/app")
    assert found is not None
    assert (found.username, found.password) == ("u", "hunter2")
    assert found.life == pytest.approx(3600, rel=0.2)
    assert asked(tmp_path) == [
        {"apiVersion": VERSION, "kind": "CredentialProviderRequest", "image": "a.example/team/app"}
    ]
    assert (tmp_path / "told").read_text() == "team-a get\n"
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("scope", "images", "runs"),
    [
        ("Image", ["a.example/x", "a.example/x", "a.example/y"], 2),
        ("Registry", ["a.example/x", "a.example/y", "b.example/x"], 2),
        ("Global", ["a.example/x", "b.example/y"], 1),
    ],
)
def test_what_was_said_is_remembered_for_what_it_is_about(
    tmp_path: Path, scope: str, images: list[str], runs: int
) -> None:
    async def ask() -> None:
        provider = ExecProvider((install(tmp_path, response(cacheKeyType=scope)),), {})
        for image in images:
            host, _, repository = image.partition("/")
            found = await provider.lookup(host, repository)
            assert (found is not None) == (host == "a.example")

    trio.run(ask)
    assert len(asked(tmp_path)) == runs


@pytest.mark.parametrize(("life", "runs"), [("1h", 1), ("60s", 2), ("0", 3), (None, 3)])
def test_it_is_asked_again_before_what_it_said_expires(tmp_path: Path, life: str | None, runs: int) -> None:
    clock = trio.testing.MockClock()

    async def ask() -> None:
        provider = ExecProvider((install(tmp_path, response(cacheDuration=life)),), {})
        for step in (0, 30, 28):
            clock.jump(step)
            assert await provider.lookup("a.example", "x") is not None

    trio.run(ask, clock=clock)
    assert len(asked(tmp_path)) == runs


def test_it_is_asked_again_after_a_refusal(tmp_path: Path) -> None:
    async def ask() -> tuple[Credential | None, Credential | None]:
        provider = ExecProvider((install(tmp_path, response()),), {})
        first = await provider.lookup("a.example", "x")
        install(tmp_path, response(auth={"a.example": {"username": "u", "password": "new"}}))
        return first, await provider.lookup("a.example", "x", again=True)

    first, second = trio.run(ask)
    assert first is not None
    assert second is not None
    assert (first.password, second.password) == ("hunter2", "new")


@pytest.mark.parametrize(
    ("pattern", "image", "does"),
    [
        ("a.example", "a.example/x", True),
        ("https://a.example", "a.example/x", True),
        ("*.example", "a.example/x", True),
        ("app*.example", "app7.example/x", True),
        ("*.example", "b.a.example/x", False),
        ("*.*.example", "b.a.example/x", True),
        ("a.example", "a.example:5000/x", False),
        ("a.example:5000", "a.example:5000/x", True),
        ("*.example:5000", "a.example/x", False),
        ("a.example/team", "a.example/team/app", True),
        ("a.example/other", "a.example/team/app", False),
        ("a.example", "a.example.evil/x", False),
        ("*", "a.example/x", False),
    ],
)
def test_patterns(pattern: str, image: str, *, does: bool) -> None:
    assert matches(pattern, image) is does


def test_the_most_particular_pattern_decides() -> None:
    auth = {name: {"username": name, "password": "p"} for name in ("a.example", "a.example/team", "*.example")}
    found = parse_response(json.dumps(response(auth=auth)).encode(), "p").find("a.example/team/app")
    assert found is not None
    assert found.username == "a.example/team"


@pytest.mark.parametrize(
    "answer",
    [
        "hunter2",
        [],
        {},
        response(apiVersion="credentialprovider.kubelet.k8s.io/v2"),
        response(kind="CredentialProviderRequest"),
        response(cacheKeyType="Everything"),
        response(cacheDuration="soon hunter2"),
        response(cacheDuration="1h x"),
        response(auth=["hunter2"]),
    ],
)
def test_what_is_no_response_is_refused_and_not_quoted(tmp_path: Path, answer: object) -> None:
    provider = ExecProvider((install(tmp_path, answer),), {})
    with pytest.raises(DeniedError, match="credential provider answered with") as caught:
        trio.run(provider.lookup, "a.example", "x")
    assert "hunter2" not in str(caught.value)


def test_programs_that_fail(tmp_path: Path) -> None:
    cases = [
        (("/bin/sh", "-c", "echo hunter2; exit 3"), "exit status 3"),
        (("/bin/sleep", "60"), "does not answer"),
        ((f"{tmp_path}/none",), "cannot be run"),
    ]
    for command, reason in cases:
        with pytest.raises(DeniedError, match=reason) as caught:
            trio.run(ExecProvider(command, dict(os.environ), timeout=0.5).lookup, "a.example", "x")
        assert "hunter2" not in str(caught.value)


def test_an_image_that_it_knows_nothing_of_is_asked_for_as_nobody(tmp_path: Path) -> None:
    provider = ExecProvider((install(tmp_path, response(auth=None)),), {})
    assert trio.run(provider.lookup, "a.example", "x") is None
