"""Stores that some version of nsfs wrote, kept to be opened by every later one.

Owns tests/stores: an archive per store, of a daemon's `root` and of `about.json`, which says what is in it. One is
added when the format of anything on disk changes, by the version before:

    PYTHONPATH=src:tests .venv/bin/python tests/stores.py NAME [SOURCES [KEY=VALUE]]

SOURCES is the `src` of the version that writes it, KEY a setting of its daemon. A store has an image that is complete,
and pinned by versions that pin, of a plain layer and one with a table of contents, and a container's snapshot to which
something was written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fakes import FakeRegistry
from images import Image, file, gzip_layer, sample_content
from nsfs_daemon import run_daemon
from published import estargz_layer, publish
from snapshots_api import Backend, mounted

if TYPE_CHECKING:
    from nsfs_daemon import Daemon

STORES = Path(__file__).parent / "stores"
NAMESPACE = "default"
PLAIN = {"etc/plain": b"plain\n", "d/plain": sample_content(13_000, 1)}
TABLE = {"d/table": sample_content(9_000, 2), "d/empty": b""}
FILES = PLAIN | TABLE
WRITTEN = {"d/written": b"by a container\n"}


@dataclass(frozen=True)
class About:
    """What is in a store."""

    reference: str
    container: str
    """Name of the container's snapshot."""
    pinned: bool


def open_store(name: str, directory: Path) -> About:
    """Unpack the store `name`; `directory` then has its `root`."""
    directory.mkdir(parents=True, exist_ok=True)
    options = ("--extract", "--xz", "--numeric-owner", "--preserve-permissions")
    subprocess.run(["tar", *options, "--directory", directory, "--file", STORES / f"{name}.tar.xz"], check=True)
    return msgspec.json.decode((directory / "about.json").read_bytes(), type=About)


def names() -> list[str]:
    """All stores."""
    return sorted(path.name.removesuffix(".tar.xz") for path in STORES.glob("*.tar.xz"))


def _fill(daemon: Daemon, registry: FakeRegistry, scratch: Path) -> About:
    layers = (
        gzip_layer([file(path, data) for path, data in PLAIN.items()]),
        estargz_layer([file(path, data) for path, data in TABLE.items()], chunk_size=4096),
    )
    image = Image(layers)
    reference = publish(registry, image, "kept")
    with daemon.mounted(reference, str(scratch / "mnt")):
        pass
    with Backend(daemon.socket) as backend:
        *_, top = backend.pull(NAMESPACE, image, reference)
        container = backend.name(NAMESPACE, "container")
        with mounted(backend.prepare(container, top), scratch / "mnt") as root:
            assert {path: (root / path).read_bytes() for path in FILES} == FILES
            for path, data in WRITTEN.items():
                (root / path).write_bytes(data)
    pinned = daemon.nsfs("pin", reference, check=False).returncode == 0
    return About(reference, container, pinned)


def write(name: str, sources: str | None, settings: dict[str, str]) -> None:
    """Have a daemon of `sources` write one."""
    if sources:
        os.environ["PYTHONPATH"] = sources
    with tempfile.TemporaryDirectory() as directory:
        with FakeRegistry() as registry, run_daemon(directory, settings) as daemon:
            about = _fill(daemon, registry, Path(directory))
        Path(directory, "about.json").write_text(json.dumps(asdict(about)))
        STORES.mkdir(exist_ok=True)
        command = ["tar", "--create", "--xz", "--sparse", "--numeric-owner", "--directory", directory, "--file"]
        subprocess.run([*command, str(STORES / f"{name}.tar.xz"), "about.json", "root"], check=True)


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, dict(each.split("=") for each in sys.argv[3:]))
