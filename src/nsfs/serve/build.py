"""Which code this is: two processes of nsfs with the same build understand each other, whatever their versions say.

Pure but for reading the package's own files, which an upgrade replaces: ask once, at the start of a process.
"""

from __future__ import annotations

import hashlib
import os

import nsfs


def identify() -> str:
    """The version, and a digest of the sources as they are on disk now."""
    top = os.path.dirname(nsfs.__file__)
    digest = hashlib.sha256()
    for directory, below, names in os.walk(top):
        below.sort()
        for name in sorted(name for name in names if name.endswith(".py")):
            with open(os.path.join(directory, name), "rb") as file:
                digest.update(f"{directory.removeprefix(top)}/{name}\0".encode() + file.read())
    return f"{nsfs.__version__}+{digest.hexdigest()[:16]}"
