"""A registry with the referrers API: the Go module in tests/goregistry, built once per machine, on a port of loopback.

The program lies in <repo>/.cache, named by its sources; building it needs Go 1.24 or newer and the module proxy. It
ends with its standard input, so with the test process at the latest.
"""

from __future__ import annotations

import functools
import pathlib
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from goprograms import build_program

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class GoRegistry:
    """A running one; `host` is what goes before the first slash of a reference."""

    host: str
    log: pathlib.Path

    @property
    def headers(self) -> dict[str, str]:
        """It lets everybody in."""
        return {}

    def requests(self) -> list[str]:
        """What was asked so far: method, path and range of each."""
        return self.log.read_text().splitlines()


@contextmanager
def run_go_registry(*, deletes: bool = True) -> Iterator[GoRegistry]:
    """Start one; where it `deletes` nothing, it refuses to."""
    with tempfile.TemporaryDirectory(prefix="nsfs-registry-") as folder:
        log = pathlib.Path(folder, "log")
        command = [go_registry_program(), f"-log={log}", f"-delete={str(deletes).lower()}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield GoRegistry(process.stdout.readline().decode().strip(), log)
        finally:
            process.stdin.close()
            process.wait()
            process.stdout.close()


@functools.cache
def go_registry_program() -> str:
    """Build it, where it is not there."""
    return build_program("goregistry")
