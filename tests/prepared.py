"""What tests need that is made once per machine and lies in .cache: it is made while other tests run.

A test module that needs such things may have a function `prepare`, which makes them all. Before the first test a
process of its own begins to call these functions, in the order of the tests; it ends with the session at the latest. A
test asks for what it needs all the same, and makes it where it is not there; both do so under `alone`, so who comes
second waits. Where tests run in several processes (pytest-xdist), the first one's alone does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CACHE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ".cache")
_NICENESS = 5
"""Tests come first."""
_BESIDE = pytest.StashKey[int]()
"""The process, which leads a session."""


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Be the only process that makes `name`, or uses it; look only then whether it is there."""
    os.makedirs(CACHE, exist_ok=True)
    with open(f"{CACHE}/{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    modules = dict.fromkeys(item.module for item in session.items if isinstance(item, pytest.Function))
    makers = [module.prepare for module in modules if hasattr(module, "prepare")]
    if makers and _is_first(session.config) and not session.config.option.collectonly:
        session.config.stash[_BESIDE] = _begin(makers)


def _is_first(config: pytest.Config) -> bool:
    """Whether no other process of this run prepares."""
    worker: dict[str, object] = getattr(config, "workerinput", {})
    return worker.get("workerid", "gw0") == "gw0"


def pytest_unconfigure(config: pytest.Config) -> None:
    if _BESIDE in config.stash:
        _end(config.stash[_BESIDE])


def _begin(makers: Iterable[Callable[[], object]]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _call(makers)
        finally:
            os._exit(0)
    return pid


def _call(makers: Iterable[Callable[[], object]]) -> None:
    """One after another; what fails is left to the test that needs it."""
    os.setsid()
    os.nice(_NICENESS)
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # by a pipe that is open others would take the first process for alive
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(nothing, fd)
    for make in makers:
        with contextlib.suppress(Exception):
            make()


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
