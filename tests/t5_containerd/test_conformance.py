"""containerd's own suite for snapshotters against a daemon of ours: `make conformance`.

The program is the Go module in tests/conformance, built once per machine into .cache and named by its sources; building
it needs the module proxy and a Go that can get itself the version that containerd wants (1.21 or newer).
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import shutil
import subprocess

import pytest

import prepared
from nsfs_daemon import run_daemon

SOURCES = pathlib.Path(__file__).resolve().parents[1] / "conformance"
CACHE = pathlib.Path(prepared.CACHE)
CHECKS = 21
"""In containerd 2.2.7."""


def prepare() -> pathlib.Path:
    sources = b"".join((SOURCES / name).read_bytes() for name in ("go.mod", "go.sum", "conformance_test.go"))
    program = CACHE / f"conformance-{hashlib.sha256(sources).hexdigest()[:16]}"
    with prepared.alone("conformance"):
        if not program.exists():
            built = program.with_suffix(f".{os.getpid()}")
            command = [find_go(), "test", "-c", "-o", str(built), "."]
            environment = os.environ | {"GOFLAGS": "-trimpath -buildvcs=false"}
            subprocess.run(command, cwd=SOURCES, env=environment, check=True, timeout=900)
            built.replace(program)
    return program


def find_go() -> str:
    go = shutil.which("go") or "/usr/local/go/bin/go"
    found = subprocess.run([go, "version"], check=False, capture_output=True, text=True) if os.path.exists(go) else None
    version = re.search(r"go1\.(\d+)", found.stdout) if found else None
    if version is None or int(version[1]) < 21:
        pytest.fail(
            "building containerd's suite needs Go 1.21 or newer on PATH: https://go.dev/dl, or bookworm-backports"
        )
    return go


@pytest.mark.timeout(1200)
def test_containerds_own_suite(tmp_path: pathlib.Path) -> None:
    program = prepare()
    with run_daemon(str(tmp_path / "daemon")) as daemon:
        command = [str(program), "-test.v", "-test.timeout=300s", "-socket", daemon.socket]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-10_000:] + daemon.tail()
        assert done.stdout.count("--- PASS: TestSuite/") == CHECKS
        assert "--- PASS: TestRenameOfLowerDirectory" in done.stdout
        print(done.stdout[-5_000:])
        assert os.listdir(f"{daemon.root}/snapshots") == []
        assert os.listdir(f"{daemon.run}/l") == ["empty"]
