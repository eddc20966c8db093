"""Whose name and secret a registry gets: docker's config.json and its credential helpers.

Owns the lookup of a credential by host, in docker's order: `credHelpers`, `credsStore`, `auths` (docker/cli,
"docker login"). The file is read at each lookup, so a new login counts at once. Helpers run as child processes with a
deadline, and are killed at it. Secrets appear in no repr, message or log; what a helper prints is never quoted.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trio

from nsfs.errors import DeniedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HUB_KEY = "https://index.docker.io/v1/"
"""What docker calls Docker Hub where it keeps credentials."""
_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NOT_FOUND = b"credentials not found"
_MAX_CONFIG = 4 << 20


@dataclass(frozen=True, slots=True)
class Credential:
    """A name and its secret, or an identity token (OAuth 2 refresh token) that stands for both."""

    username: str
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    life: float | None = None
    """Seconds after which it is to be looked up again; None where nothing is known of that."""

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class Credentials(Protocol):
    """Finds the credential for a server."""

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        """For `repository` of `host` (host[:port], docker.io for Docker Hub); None to ask without one.

        `again` says that what was found before was refused. Raises NsfsError.
        """


class Anonymous:
    """Nobody's."""

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        """None."""
        del host, repository, again
        return None


class FirstOf:
    """The first of several that knows a host."""

    def __init__(self, several: Sequence[Credentials]) -> None:
        self._several = several

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        """As `Credentials.lookup`."""
        for each in self._several:
            found = await each.lookup(host, repository, again=again)
            if found is not None:
                return found
        return None


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """The credentials that `docker login` left in a config.json."""

    path: str
    helper_timeout: float = 30.0
    """Seconds."""
    helper_path: str | None = None
    """Where docker-credential-NAME is searched, PATH if None."""

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        """As `Credentials.lookup`; a missing file knows nobody, a malformed one is a UsageError.

        Raises DeniedError where the file names a helper, and somebody else than its user could have written that.
        """
        del repository, again
        config = await trio.to_thread.run_sync(load_config, self.path)
        helper = plan_helper(config, host)
        if helper is None:
            return parse_auths(config, host)
        await trio.to_thread.run_sync(check_owner, self.path)
        return await self._ask(helper, HUB_KEY if host in _HUB_HOSTS else host)

    async def _ask(self, helper: str, server: str) -> Credential | None:
        program = f"docker-credential-{helper}"
        environment = dict(os.environ) if self.helper_path is None else {**os.environ, "PATH": self.helper_path}
        with trio.move_on_after(self.helper_timeout):
            try:
                done = await trio.run_process(
                    ["/usr/bin/env", program, "get"],
                    stdin=server.encode(),
                    capture_stdout=True,
                    stderr=subprocess.DEVNULL,
                    check=False,
                    env=environment,
                )
            except OSError as error:
                raise DeniedError(f"credential helper cannot be run: {program}: {error.strerror}") from None
            return parse_helper_answer(program, done.returncode, done.stdout)
        raise DeniedError(f"credential helper does not answer: {program}: {self.helper_timeout:g} s")


def config_path(environ: Mapping[str, str]) -> str:
    """Where `docker login` keeps what it is told."""
    directory = environ.get("DOCKER_CONFIG") or os.path.join(environ.get("HOME", "/root"), ".docker")
    return os.path.join(directory, "config.json")


def load_config(path: str) -> dict[str, Any]:
    """The table that a config.json holds, {} if there is none."""
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(_MAX_CONFIG))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"unreadable docker configuration: {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"malformed docker configuration: {path}") from None
    if not isinstance(config, dict):
        raise UsageError(f"malformed docker configuration: {path}")
    return config


def check_owner(path: str) -> None:
    """Raise DeniedError unless the file is ours, or root's: it decides which program is run by us."""
    status = os.stat(path)
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & 0o022:
        raise DeniedError(
            f"a credential helper is named by a file that others may write: {path}",
            hint="have it owned by whom the daemon runs as, or keep credentials in the file itself",
        )


def plan_helper(config: dict[str, Any], host: str) -> str | None:
    """The name of the helper that knows `host`, None if `auths` does."""
    helpers = config.get("credHelpers")
    by_host = _by_host(helpers) if isinstance(helpers, dict) else {}
    name = by_host.get(key_of(host)) or config.get("credsStore")
    if not name:
        return None
    if not isinstance(name, str) or _HELPER_NAME.fullmatch(name) is None:
        raise UsageError("malformed docker configuration: a credential helper's name is no program name")
    return name


def parse_auths(config: dict[str, Any], host: str) -> Credential | None:
    """What `auths` holds for `host`."""
    auths = config.get("auths")
    entry = _by_host(auths).get(key_of(host)) if isinstance(auths, dict) else None
    if not isinstance(entry, dict):
        return None
    username, password = _text(entry, "username"), _text(entry, "password")
    if encoded := _text(entry, "auth"):
        username, password = _decode(encoded, host)
    token = _text(entry, "identitytoken")
    return Credential(username, password, token) if token or username else None


def parse_helper_answer(program: str, status: int, output: bytes) -> Credential | None:
    """What `docker-credential-x get` printed: JSON, or that it knows nothing (docker/docker-credential-helpers)."""
    if status == 127:
        raise DeniedError(f"credential helper is not installed: {program}")
    if status != 0:
        if _NOT_FOUND in output.lower():
            return None
        raise DeniedError(f"credential helper failed: {program}: exit status {status}")
    try:
        answer = json.loads(output)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise DeniedError(f"credential helper answered with something else than JSON: {program}")
    username, secret = _text(answer, "Username"), _text(answer, "Secret")
    return Credential("", identity_token=secret) if username == "<token>" else Credential(username, secret)


def _by_host(table: dict[str, Any]) -> dict[str, Any]:
    """`table` with its keys, which may be URLs of old, as bare hosts; exact hosts win."""
    exact = {key.lower(): value for key, value in table.items() if "/" not in key}
    return {key_of(key): value for key, value in table.items()} | exact


def key_of(host: str) -> str:
    """`host`, or a URL that stands for it, as a bare host in lower case; docker.io for Docker Hub."""
    bare = host.lower().removeprefix("https://").removeprefix("http://").partition("/")[0]
    return "docker.io" if bare in _HUB_HOSTS else bare


def _decode(encoded: str, host: str) -> tuple[str, str]:
    try:
        username, colon, password = base64.b64decode(encoded).decode().partition(":")
    except ValueError:
        username, colon, password = "", "", ""
    if not colon:
        raise UsageError(f"malformed docker configuration: auth of {host}")
    return username, password.rstrip("\0")


def _text(table: dict[str, Any], key: str) -> str:
    value = table.get(key)
    return value if isinstance(value, str) else ""
