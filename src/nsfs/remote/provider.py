"""Credentials from a program that is asked when they are needed: a kubelet credential provider.

Owns the conversation (Kubernetes, "Configure a kubelet image credential provider",
credentialprovider.kubelet.k8s.io/v1): one JSON request on the program's stdin, one JSON response on its stdout, and how
long and for what the response holds. Patterns in it are matched as the kubelet does: the same port, as many parts of a
domain, `*` within one of them, and a path that the image's begins with. Refuses what is no such response. The program
is killed at a deadline; nothing that it prints is ever quoted.

Concurrency: callers who ask for the same at a time share one run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import trio

from nsfs.errors import DeniedError
from nsfs.remote.credentials import Credential

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION: Final = "credentialprovider.kubelet.k8s.io/v1"
_REQUEST: Final = "CredentialProviderRequest"
_RESPONSE: Final = "CredentialProviderResponse"
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_STEP: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_MARGIN: Final = 0.9
"""The part of its life for which a response is used, so that it is asked for again before it expires."""
_KEPT: Final = 1024


@dataclass(frozen=True, slots=True)
class Response:
    """What a program said: credentials by pattern, and for what and how many seconds they hold."""

    scope: str
    """Image, Registry or Global."""
    life: float
    auths: tuple[tuple[str, Credential], ...]

    def find(self, image: str) -> Credential | None:
        """The credential of the most particular pattern that matches."""
        for pattern, credential in sorted(self.auths, key=lambda pair: pair[0], reverse=True):
            if matches(pattern, image):
                return credential
        return None


class ExecProvider:
    """Credentials by asking a program; see the module."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, timeout: float = 60.0) -> None:
        self._command = tuple(command)
        self._environment = {**os.environ, **environment}
        self._timeout = timeout
        self._known: dict[str, tuple[Response, float]] = {}
        self._lock = trio.Lock()

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        """As `Credentials.lookup`; raises DeniedError where the program fails."""
        image = f"{host}/{repository}"
        async with self._lock:
            found = None if again else self._recall(image)
            if found is None:
                found = await self._ask(image), trio.current_time()
                self._remember(image, *found)
        response, since = found
        credential = response.find(image)
        left = response.life * _MARGIN - (trio.current_time() - since)
        return credential and replace(credential, life=max(left, 0.0))

    def _recall(self, image: str) -> tuple[Response, float] | None:
        for key in (image, image.partition("/")[0], ""):
            found = self._known.get(key)
            if found is not None and trio.current_time() < found[1] + found[0].life * _MARGIN:
                return found
        return None

    def _remember(self, image: str, response: Response, since: float) -> None:
        key = {"Image": image, "Registry": image.partition("/")[0], "Global": ""}[response.scope]
        while len(self._known) >= _KEPT:
            del self._known[next(iter(self._known))]
        self._known[key] = response, since

    async def _ask(self, image: str) -> Response:
        program = self._command[0]
        request = {"apiVersion": VERSION, "kind": _REQUEST, "image": image}
        with trio.move_on_after(self._timeout):
            try:
                done = await trio.run_process(
                    self._command,
                    stdin=json.dumps(request).encode(),
                    capture_stdout=True,
                    stderr=subprocess.DEVNULL,
                    check=False,
                    env=self._environment,
                )
            except OSError as error:
                raise DeniedError(f"credential provider cannot be run: {program}: {error.strerror}") from None
            if done.returncode != 0:
                raise DeniedError(f"credential provider failed: {program}: exit status {done.returncode}")
            return parse_response(done.stdout, program)
        raise DeniedError(f"credential provider does not answer: {program}: {self._timeout:g} s")


def parse_response(output: bytes, program: str) -> Response:
    """A program's answer; raises DeniedError for what is none."""
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or answer.get("apiVersion") != VERSION or answer.get("kind") != _RESPONSE:
        raise DeniedError(f"credential provider answered with something else than a {_RESPONSE} of v1: {program}")
    scope, auths = answer.get("cacheKeyType"), answer.get("auth") or {}
    life = _parse_duration(answer.get("cacheDuration"))
    if scope not in {"Image", "Registry", "Global"} or life is None or not isinstance(auths, dict):
        raise DeniedError(f"credential provider answered with a malformed {_RESPONSE}: {program}")
    return Response(scope, life, tuple((str(pattern), _credential(entry)) for pattern, entry in auths.items()))


def matches(pattern: str, image: str) -> bool:
    """Whether `pattern` ([scheme://]host[:port][/path], `*` within a part of the host) is about `image`."""
    host, _, path = pattern.removeprefix("https://").removeprefix("http://").partition("/")
    wanted, _, wanted_path = image.partition("/")
    name, _, port = host.partition(":")
    wanted_name, _, wanted_port = wanted.partition(":")
    parts, wanted_parts = name.lower().split("."), wanted_name.lower().split(".")
    return (
        port == wanted_port
        and len(parts) == len(wanted_parts)
        and all(fnmatchcase(part, glob) for glob, part in zip(parts, wanted_parts, strict=True))
        and wanted_path.startswith(path)
    )


def _credential(entry: Any) -> Credential:  # noqa: ANN401  any JSON value
    table = entry if isinstance(entry, dict) else {}
    return Credential(str(table.get("username", "")), str(table.get("password", "")))


def _parse_duration(text: object) -> float | None:
    """Seconds of a duration as Go writes it; 0 where nothing is said, None for what is none."""
    if text is None or text == "0":
        return 0.0
    if not isinstance(text, str) or re.fullmatch(f"(?:{_STEP.pattern})+", text) is None:
        return None
    return sum(float(step[1]) * _UNITS[step[2]] for step in _STEP.finditer(text))
