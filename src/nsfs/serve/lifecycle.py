"""How a daemon's life ends: who asked for it, and what is to become of what is mounted.

Owns `nsfs drain`, which refuses while containers stand on snapshots, and `nsfs upgrade`, by which the daemon gives its
place, and its process ID, to the code that is installed now, which reads configuration and policy anew. Refuses an
upgrade to what does not start.

Concurrency: the first who asks decides. What is installed is tried in a process of its own, waited for in a thread.
"""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from nsfs.errors import BusyError, NsfsError, UnsupportedError
from nsfs.serve import api

if TYPE_CHECKING:
    from nsfs.core.manual import ManualMounts
    from nsfs.core.namespaces import Namespaces
    from nsfs.serve.control_rpc import Handler, Report
    from nsfs.serve.keeping import Keeper

_TRY: Final = """
import nsfs.daemon, nsfs.front, nsfs.layer_jobs, nsfs.worker
from nsfs.serve.build import identify
print(identify())
"""
_DEADLINE: Final = 60.0
"""Seconds for what is installed to say that it can be started."""
_FINISHING: Final = 10.0
"""Seconds for calls to come to an end before the daemon does."""
_NAMED: Final = 5
"""Users that a refusal names."""


class End(enum.Enum):
    """What becomes of mounts and workers."""

    LEAVE = "leave"
    """They go on, for the next daemon."""
    REPLACE = "replace"
    """They go on, for the code that takes our place at once."""
    TAKE_AWAY = "take away"


_FOLLOWS: Final = {End.REPLACE: 60.0, End.LEAVE: 10.0}
"""Seconds for another daemon to serve; it is not known whether one follows that was told to leave."""


class Ending:
    """Whether the daemon is to end, and how."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.how = End.TAKE_AWAY

    @property
    def patience(self) -> float:
        """Seconds for which calls that run are waited for: where another daemon follows, nobody shall notice."""
        return 0.0 if self.how is End.TAKE_AWAY else _FINISHING

    @property
    def follows_within(self) -> float:
        """Seconds in which another daemon serves, if one does; 0: none will."""
        return _FOLLOWS.get(self.how, 0.0)

    def ask(self, how: End) -> None:
        """End; nothing happens where somebody has asked before."""
        if not self.asked.is_set():
            self.how = how
            self.asked.set()


class Lifecycle:
    """Its handlers; without a keeper nothing outlives the daemon."""

    def __init__(self, ending: Ending, namespaces: Namespaces, mounts: ManualMounts, keeper: Keeper | None) -> None:
        self._ending = ending
        self._namespaces = namespaces
        self._mounts = mounts
        self._keeper = keeper

    def handlers(self) -> dict[str, Handler]:
        """By method name."""
        return {"Drain": self._drain, "Upgrade": self._upgrade}

    async def _drain(self, request: api.DrainRequest, _report: Report) -> api.Drained:
        holdings = await self._namespaces.holdings()
        containers = [key for name in sorted(holdings) for key in holdings[name].containers]
        if containers and not request.force:
            raise BusyError(
                f"containers stand on snapshots: {_first(containers)}", hint="delete the containers, or say --force"
            )
        targets = [record.target for record in self._mounts.records()]
        for target in targets:
            await self._mounts.umount(target, force=request.force)
        self._ending.ask(End.TAKE_AWAY)
        return api.Drained(mounts=len(targets), containers=len(containers))

    async def _upgrade(self, _request: api.Empty, _report: Report) -> api.UpgradeReport:
        return await self.upgrade()

    async def upgrade(self) -> api.UpgradeReport:
        """Have what is installed take our place; raises NsfsError where it does not start, and we go on."""
        if self._keeper is None:
            raise UnsupportedError("a private daemon is not upgraded: it ends with its last mount")
        build = await trio.to_thread.run_sync(try_installed)
        self._ending.ask(End.REPLACE)
        return api.UpgradeReport(was=self._keeper.build, build=build)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def try_installed() -> str:
    """The build of the code that is installed now, if it starts, and with our configuration; raises NsfsError."""
    build = _run([sys.executable, "-P", "-c", _TRY])
    _run([*_command(), "--check"])
    return build


def replace_us() -> NoReturn:
    """Execute what is installed now in our place."""
    command = _command()
    os.execv(command[0], command)  # noqa: S606  the program that we are


def _command() -> list[str]:
    """As we were started."""
    return [sys.executable, *sys.orig_argv[1:]]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        raise NsfsError(f"what is installed does not start within {_DEADLINE:g} s") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("hint: ")] or [""]
        reason = said[-1].removeprefix("nsfs: ")
        raise NsfsError(f"what is installed does not start: {reason}", hint="everything goes on as it was")
    return done.stdout.strip()
