"""The one rule for names in layers: what a tar header or a table of contents says becomes a path below the root.

Owns `clean_path`. Refuses names that leave the root and names that no Linux filesystem can hold. Pure. Invariant: what
it returns has no leading or trailing slash, no empty, `.` or `..` component, no NUL, components of at most 255 bytes,
and is at most 4,096 bytes long; the root itself is b"". Cleaning a clean path changes nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nsfs.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME_MAX = 255
"""Bytes of one component (Linux, limits.h)."""
PATH_MAX = 4096
"""Bytes of a whole path (Linux, limits.h)."""

_UNCLEAN = re.compile(rb"\A[/.]|//|/\.|/\Z|\0")
"""Matches every path that needs more than a look at its length; also a few clean ones (dot files)."""


def clean_path(raw: bytes) -> bytes:
    """Return the path below the root that `raw` names; `..` is resolved by the text alone, as Go's `path.Clean` does.

    Raises CorruptError if it leaves the root, has a NUL, a component over 255 bytes, or more than 4,096 bytes.
    """
    if len(raw) > PATH_MAX:
        raise CorruptError(f"a path is longer than {PATH_MAX} bytes: {raw[:60]!r}...")
    path = _resolve(raw) if _UNCLEAN.search(raw) else raw
    if len(path) > NAME_MAX and max(map(len, path.split(b"/"))) > NAME_MAX:
        raise CorruptError(f"a name is longer than {NAME_MAX} bytes: {raw[:60]!r}...")
    return path


def are_clean(paths: Iterable[bytes]) -> bool:
    """Whether cleaning any of `paths` would change nothing, told of all at once: a tenth of what one by one takes.

    Raises CorruptError where one is too long.
    """
    named = [path for path in paths if path]
    joined = b"/".join([b"", *named, b""])
    return not any(part in joined for part in (b"\0", b"//", b"/./", b"/../")) and (
        max(map(len, named), default=0) <= NAME_MAX or all(clean_path(path) == path for path in named)
    )


def _resolve(raw: bytes) -> bytes:
    if b"\0" in raw:
        raise CorruptError(f"a path contains a NUL byte: {raw[:200]!r}")
    parts: list[bytes] = []
    for part in raw.split(b"/"):
        if part == b"..":
            if not parts:
                raise CorruptError(f"a path leaves the root: {raw[:200]!r}")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)
