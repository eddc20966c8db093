"""Logging in: a credential is tried at its registry, and kept in a docker configuration as `docker login` keeps it.

Owns how such a file is changed: one entry of `auths`, everything else in it as it was; written beside it, synced and
renamed, for its owner alone (0600). Refuses to keep a secret that the registry does not accept, and to write where a
credential helper has the say. Files block; the rest is trio.
"""

from __future__ import annotations

import base64
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nsfs.errors import DeniedError, NotFoundError, NsfsError, UnsupportedError, UsageError
from nsfs.remote.client import Connections, Get, Meter, Server
from nsfs.remote.credentials import HUB_KEY, key_of, load_config, plan_helper
from nsfs.remote.reference import Reference, parse_reference

if TYPE_CHECKING:
    from nsfs.remote.credentials import Credential
    from nsfs.remote.hosts import Hosts
    from nsfs.remote.transport import Timeouts

_PING = Get("/", "", "login")


def parse_registry(text: str) -> str:
    """The host that `text` (a host, or a URL as docker writes them) names; raises UsageError."""
    host = key_of(text)
    try:
        reference = parse_reference(f"{host}/x")
        if isinstance(reference, Reference) and reference.registry == host:
            return host
    except NsfsError:
        pass
    raise UsageError(f"not a registry: {text[:200]!r}", hint="registry.example, or registry.example:5000")


async def try_login(registry: str, credential: Credential, hosts: Hosts, timeouts: Timeouts) -> None:
    """Ask `registry` who we are; raises DeniedError where it does not accept the credential, other NsfsErrors."""
    own = [each for each in await hosts.endpoints(registry) if not each.namespace]
    if not own:
        raise UsageError(f"the registry itself is never asked: {registry}", hint="log in at its mirror, see hosts.toml")
    connections = Connections(os.environ, timeouts, 1)
    try:
        async with Server(own[0], registry, connections, _Only(credential)).open(_PING, Meter()) as answer:
            await answer.read(1 << 20, "login")
    except DeniedError as error:
        raise DeniedError(error.message, hint="check username and password; nothing was kept") from error
    finally:
        await connections.aclose()


class _Only:
    """One credential, whoever asks: who asks was chosen before."""

    def __init__(self, credential: Credential) -> None:
        self._credential = credential

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential:
        """It."""
        del host, repository, again
        return self._credential


def put_login(path: str, registry: str, credential: Credential) -> None:
    """Keep a credential in the configuration at `path`; raises UnsupportedError where a helper keeps them."""
    config = load_config(path)
    if (helper := plan_helper(config, registry)) is not None:
        raise UnsupportedError(
            f"credentials for {registry} are kept by a helper: docker-credential-{helper}", hint=f"see {path}"
        )
    auths = _others(config, registry)
    secret = base64.b64encode(f"{credential.username}:{credential.password}".encode()).decode()
    auths[HUB_KEY if registry == "docker.io" else registry] = {"auth": secret}
    _write(path, {**config, "auths": auths})


def drop_login(path: str, registry: str) -> None:
    """Forget what the configuration at `path` has for `registry`; raises NotFoundError where that is nothing."""
    config = load_config(path)
    auths = _others(config, registry)
    if len(auths) == len(config.get("auths") or {}):
        raise NotFoundError(f"nobody is logged in there: {registry}")
    _write(path, {**config, "auths": auths})


def _others(config: dict[str, Any], registry: str) -> dict[str, Any]:
    auths = config.get("auths") or {}
    if not isinstance(auths, dict):
        raise UsageError("malformed docker configuration: auths is no table")
    return {key: value for key, value in auths.items() if key_of(key) != registry}


def _write(path: str, config: dict[str, Any]) -> None:
    """Replace the file, which keeps its owner; a link to it stays one."""
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    made = f"{path}.{os.getpid()}.tmp"
    try:
        with open(made, "w", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o600)) as file:
            with suppress(FileNotFoundError):
                owner = os.stat(path)
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            json.dump(config, file, indent="\t")
            file.flush()
            os.fsync(file.fileno())
        os.rename(made, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(made)
        raise
