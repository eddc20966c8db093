"""A registry with the referrers API: the Go module in tests/goregistry, built once per machine, on a port of loopback.

The program lies in <repo>/.cache, named by its sources; building it needs Go 1.24 or newer and the module proxy. It
ends with its standard input, so with the test process at the latest.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = pathlib.Path(__file__).resolve().parent
SOURCES = TESTS / "goregistry"
CACHE = pathlib.Path(prepared.CACHE)


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
        command = [str(go_registry_program()), f"-log={log}", f"-delete={str(deletes).lower()}"]
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
def go_registry_program() -> pathlib.Path:
    """Build it, where it is not there."""
    sources = b"".join((SOURCES / name).read_bytes() for name in ("go.mod", "go.sum", "main.go"))
    program = CACHE / f"goregistry-{hashlib.sha256(sources).hexdigest()[:16]}"
    with prepared.alone("goregistry"):
        if not program.exists():
            built = program.with_suffix(f".{os.getpid()}")
            go = shutil.which("go") or "/usr/local/go/bin/go"
            environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false"}
            subprocess.run([go, "build", "-o", built, "."], cwd=SOURCES, env=environment, check=True, timeout=600)
            built.replace(program)
    return program
