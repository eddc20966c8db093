"""eStargz blobs made by the reference implementation: the Go module in tests/estargz, built once per machine.

The program lies in <repo>/.cache, named by its sources; building it needs Go 1.19 or newer and the module proxy.
"""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import tempfile
from typing import NamedTuple

from goprograms import build_program


class Estargz(NamedTuple):
    blob: bytes
    toc_digest: str
    diff_id: str
    toc: bytes
    """The external table, a tar.gz; b"" where the blob has it."""


def convert(
    tar: bytes,
    *,
    chunk_size: int = 0,
    min_chunk_size: int = 0,
    prioritized: tuple[str, ...] = (),
    footer: str = "estargz",
) -> Estargz:
    """The eStargz of `tar`, plain or gzip; `footer` is estargz, legacy or external."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: pathlib.Path(folder, name) for name in ("in", "out", "toc")}
        paths["in"].write_bytes(tar)
        sizes = [f"-chunk-size={chunk_size}", f"-min-chunk-size={min_chunk_size}"]
        files = [f"-{name}={path}" for name, path in paths.items()]
        command = [_program(), *files, *sizes, f"-footer={footer}", "-prioritized=" + "\n".join(prioritized)]
        printed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout)
        toc = paths["toc"].read_bytes() if footer == "external" else b""
        return Estargz(paths["out"].read_bytes(), printed["toc_digest"], printed["diff_id"], toc)


@functools.cache
def _program() -> str:
    return build_program("estargz")
