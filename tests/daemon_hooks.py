"""Daemons that are not as they should be: a module of a test's own is imported by them, their zygotes and workers."""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WHERE = """
    with open("/proc/self/cmdline", "rb") as command:
        if {b"serve", b"nsfs.serve.forkserver"}.intersection(command.read().split(b"\\0")):
            import hooks
"""


@contextmanager
def hooked(directory: Path, *hooks: str) -> Iterator[None]:
    """Daemons that are started meanwhile begin with this code; `directory` is where it is put."""
    (directory / "hook").mkdir()
    (directory / "hook" / "hooks.py").write_text("".join(map(textwrap.dedent, hooks)))
    (directory / "hook" / "sitecustomize.py").write_text(textwrap.dedent(_WHERE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{directory}/hook", prepend=":")
        yield
