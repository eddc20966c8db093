"""What a worker sees as /etc: a directory of copies that the daemon keeps as the host's own are.

Owns those directories: one for all workers that resolve names as the host does, one for each that has a resolv.conf of
its own. A directory is shown and not its files, because files there are replaced, and a mount of one would go on
showing what was replaced. Copies are replaced in turn, so that a reader sees the old one or the new one.

Concurrency: `make` and `refresh` block; one at a time, in a thread.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from nsfs.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

RESOLV_CONF: Final = "resolv.conf"
_SHOWN: Final = ("gai.conf", "host.conf", "hosts", "localtime", "nsswitch.conf", "protocols", RESOLV_CONF, "services")
"""What the C library reads to resolve names and tell the time."""
_EVERY: Final = 2.0
"""Seconds between two looks."""


class HostFiles:
    """The copies."""

    def __init__(self, etc: str = "/etc") -> None:
        self._etc = etc
        self._made: dict[str, str] = {}
        """The resolv.conf of each directory."""
        self._seen: dict[str, tuple[int, int, int]] = {}
        """What each copy was made of."""

    def make(self, directory: str, resolv_conf: str = "") -> None:
        """Fill `directory`, and keep it so; `resolv_conf` takes the place of the host's. Raises NotFoundError."""
        if resolv_conf and not os.path.isfile(resolv_conf):
            raise NotFoundError(f"no such resolv.conf: {resolv_conf}")
        os.makedirs(directory, 0o755, exist_ok=True)
        os.chmod(directory, 0o755)  # noqa: S103  for every worker, whatever the umask is
        self.keep(directory, resolv_conf)
        self._fill(directory)

    def keep(self, directory: str, resolv_conf: str = "") -> None:
        """Keep a directory that an earlier daemon made."""
        self._made[directory] = resolv_conf or f"{self._etc}/{RESOLV_CONF}"

    def forget(self, directory: str) -> None:
        """Keep it no longer."""
        self._made.pop(directory, None)

    def refresh(self) -> None:
        """Copy again what has changed."""
        for directory in list(self._made):
            self._fill(directory)

    async def follow(self) -> None:
        """Refresh for ever."""
        while True:
            await trio.sleep(_EVERY)
            await trio.to_thread.run_sync(self.refresh)

    def _fill(self, directory: str) -> None:
        for target, source in self._sources(directory).items():
            with suppress(OSError):  # what cannot be read now is read next time; the copy of before stays
                self._copy(source, target)

    def _sources(self, directory: str) -> Mapping[str, str]:
        sources = {f"{directory}/{name}": f"{self._etc}/{name}" for name in _SHOWN}
        return sources | {f"{directory}/{RESOLV_CONF}": self._made[directory]}

    def _copy(self, source: str, target: str) -> None:
        try:
            status = os.stat(source)
        except (FileNotFoundError, NotADirectoryError):
            with suppress(FileNotFoundError):
                os.unlink(target)
            self._seen.pop(target, None)
            return
        seen = status.st_ino, status.st_size, status.st_mtime_ns
        if self._seen.get(target) == seen and os.path.exists(target):
            return
        with open(source, "rb") as file, open(f"{target}.tmp", "wb") as copy:
            copy.write(file.read())
            os.fchmod(copy.fileno(), 0o644)
        os.replace(f"{target}.tmp", target)
        self._seen[target] = seen
