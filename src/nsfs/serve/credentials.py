"""Each namespace's own credentials, as the daemon keeps, finds and gives them.

A namespace is here whoever owns mounts: `model.policy.owner_name`.

Owns who asks registries with what: first the namespace's own docker configuration (the one that its table of the
configuration names, else the one that `nsfs login` keeps), then its own provider, then, for the namespace `default` or
where an administrator said so for all, the host's. Nobody else's, ever: a namespace without any asks as nobody. A
private daemon belongs to one user, and has that user's docker configuration for everything.

Secrets are in memory only while they are asked for, or as long as a provider said; they are in no message, log, repr or
core dump. Concurrency: any number of tasks.
"""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import trio

from nsfs.core import worker_api
from nsfs.errors import NsfsError, UnsupportedError
from nsfs.model.policy import check_owner
from nsfs.remote.credentials import Anonymous, Credential, DockerConfig, FirstOf, config_path
from nsfs.remote.hosts import HostsDirectory
from nsfs.remote.logins import drop_login, parse_registry, put_login, try_login
from nsfs.remote.provider import ExecProvider
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nsfs.remote.credentials import Credentials
    from nsfs.serve.config import Config
    from nsfs.serve.lending import Uplink
    from nsfs.serve.wire import Methods, Report
    from nsfs.store.layout import Layout

HOST: Final = "default"
"""The namespace that is the host's own: of whoever names none."""


class Keychain:
    """Every namespace's credentials."""

    def __init__(self, config: Config, layout: Layout, environ: Mapping[str, str], *, private: bool) -> None:
        self._config = config
        self._layout = layout
        self._host = DockerConfig(config.registry.docker_config or config_path(environ))
        self._private = private
        self.of = lru_cache(maxsize=None)(self._open)
        """The credentials of a namespace; "" for a domain that belongs to none."""

    def _open(self, namespace: str) -> Credentials:
        if self._private:
            return self._host
        return FirstOf(list(self._chain(namespace))) if namespace else Anonymous()

    def _chain(self, namespace: str) -> Iterator[Credentials]:
        yield DockerConfig(self._file(namespace))
        command = self._config.of_namespace(namespace).credential_provider
        if command:
            yield ExecProvider(command, {"NSFS_NAMESPACE": namespace})
        if namespace == HOST or self._config.registry.docker_config_for == "all":
            yield self._host

    def _file(self, namespace: str) -> str:
        return self._config.of_namespace(namespace).docker_config or self._layout.credentials(namespace)

    async def login(self, namespace: str, registry: str, credential: Credential) -> str:
        """Try a credential at `registry`, and keep it for `namespace`; gives the host that it is for.

        Raises DeniedError where the registry does not accept it, UnsupportedError where we keep none, NsfsError.
        """
        self._refuse_private()
        host, path = parse_registry(registry), self._file(check_owner(namespace))
        timeouts = Timeouts(self._config.registry.connect_timeout, self._config.registry.read_timeout)
        await try_login(host, credential, HostsDirectory(self._config.registry.config_path), timeouts)
        await trio.to_thread.run_sync(put_login, path, host, credential)
        return host

    async def logout(self, namespace: str, registry: str) -> None:
        """Forget what `namespace` has for `registry`; raises NotFoundError where that is nothing."""
        self._refuse_private()
        path = self._file(check_owner(namespace))
        await trio.to_thread.run_sync(drop_login, path, parse_registry(registry))

    def logins(self) -> list[str]:
        """Owners for whom `nsfs login` kept anything. Blocks."""
        try:
            return sorted(map(unquote, os.listdir(self._layout.logins)))
        except FileNotFoundError:
            return []

    async def forget(self, namespace: str) -> None:
        """Delete what `nsfs login` kept for a namespace that is no more; a file of the administrator's stays."""
        path = self._layout.credentials(check_owner(namespace))
        await trio.to_thread.run_sync(_delete, os.path.dirname(path))

    def _refuse_private(self) -> None:
        if self._private:
            raise UnsupportedError(
                "a private daemon asks with its user's docker configuration", hint="docker login, or podman login"
            )

    def methods(self, namespace: str) -> Methods:
        """What a worker of that namespace may ask: for its own credentials, and nobody else's."""
        credentials = self.of(namespace)

        async def find(asked: worker_api.CredentialRequest, _report: Report) -> worker_api.CredentialAnswer:
            found = await credentials.lookup(asked.host, asked.repository, again=asked.again)
            return worker_api.CredentialAnswer() if found is None else _answer(found)

        return {"Credential": (worker_api.CredentialRequest, find)}


class AskedCredentials:
    """A worker's credentials: whatever its daemon says."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink

    async def lookup(self, host: str, repository: str, *, again: bool = False) -> Credential | None:
        """As `Credentials.lookup`."""
        asked = worker_api.CredentialRequest(host=host, repository=repository, again=again)
        found = await self._uplink.call("Credential", asked, worker_api.CredentialAnswer)
        if not found.known:
            return None
        return Credential(found.username, found.password, found.identity_token, found.life)


def _answer(found: Credential) -> worker_api.CredentialAnswer:
    return worker_api.CredentialAnswer(
        known=True,
        username=found.username,
        password=found.password,
        identity_token=found.identity_token,
        life=found.life,
    )


def _delete(directory: str) -> None:
    """All of it: a daemon that was killed while it wrote may have left a copy beside the file."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise NsfsError(f"credentials are left: {directory}: {error.strerror}") from None
