"""The wheel alone, without the clone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nsfs import __version__

_CLONE = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_wheel_installs_and_runs_without_the_clone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(_CLONE)], check=True)
    (wheel,) = tmp_path.glob("nsfs-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    (purelib,) = home.glob("lib/python3*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(home),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, check=True)
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*arguments: str) -> str:
        command = [str(home / "bin/nsfs"), *arguments]
        return subprocess.run(command, check=True, cwd="/", env={}, stdout=subprocess.PIPE, text=True).stdout

    assert run("--version") == f"nsfs {__version__}\n"
    assert "Exit codes" in run("--help")
    where = [str(home / "bin/python"), "-c", "import nsfs.serve.doctor as d; print(d.__file__)"]
    shown = subprocess.run(where, check=True, cwd="/", env={}, stdout=subprocess.PIPE, text=True).stdout
    assert shown.startswith(str(purelib))
