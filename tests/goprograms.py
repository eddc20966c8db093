"""Programs of Go that tests run: modules below tests, each built once per machine.

A program lies in <repo>/.cache, named by its sources; building it needs Go and the module proxy.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess

import prepared

TESTS = pathlib.Path(__file__).resolve().parent


def build_program(name: str) -> str:
    """The program of the module tests/<name>, built where it is not there."""
    folder = TESTS / name
    sources = b"".join((folder / each).read_bytes() for each in ("go.mod", "go.sum", "main.go"))
    program = pathlib.Path(prepared.CACHE, f"{name}-{hashlib.sha256(sources).hexdigest()[:16]}")
    with prepared.alone(name):
        if not program.exists():
            built = program.with_suffix(f".{os.getpid()}")
            go = shutil.which("go") or "/usr/local/go/bin/go"
            environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false"}
            subprocess.run([go, "build", "-o", built, "."], cwd=folder, env=environment, check=True, timeout=600)
            built.replace(program)
    return str(program)
