"""The smallest image that can run something: Debian's static busybox, and a layer that changes a little of it."""

from __future__ import annotations

import functools

from images import Image, Item, Layer, directory, file, gzip_layer, sample_content, symlink, whiteout

_APPLETS = (
    "sh",
    "cat",
    "ls",
    "sleep",
    "echo",
    "sync",
    "true",
    "find",
    "stat",
    "sha256sum",
    "sort",
    "id",
    "touch",
    "rm",
)

WORDS = sample_content(300_000)
"""/data/words of the second layer."""

_LOOK = "find / -xdev ! -path / ! -path '/proc*' ! -path '/sys*' ! -path '/dev*' ! -path '/run*'"
LISTING = f"""
    {_LOOK} -type d -exec stat -c '%n %f %u %g' {{}} + | sort
    {_LOOK} ! -type d -exec stat -c '%n %f %u %g %s %h %Y %N' {{}} + | sort
    {_LOOK} -type f -exec sha256sum {{}} + | sort
"""
"""A script that prints every name of the rootfs with what stat tells of it, and the digest of every file.

Times of directories are those of the unpacking wherever that touched them, and the root is each container's own.
"""


@functools.cache
def base() -> Layer:
    """Programs, and the directories that a runtime mounts over."""
    with open("/usr/bin/busybox", "rb") as program:
        items: list[Item] = [directory("bin"), file("bin/busybox", program.read(), 0o755)]
    items += [symlink(f"bin/{applet}", "busybox") for applet in _APPLETS]
    items += [directory(name) for name in ("etc", "proc", "sys", "dev", "run", "root")]
    items += [directory("tmp", 0o1777), file("etc/motd", b"the base\n"), directory("old"), file("old/a", b"a")]
    return gzip_layer(items)


@functools.cache
def image() -> Image:
    """What the tests run; in the upper layer a changed file, a removed one, a new one."""
    upper = gzip_layer(
        [file("etc/motd", b"the second layer\n"), whiteout("old/a"), directory("data"), file("data/words", WORDS)]
    )
    return Image((base(), upper), {"Env": ["PATH=/bin"], "Cmd": ["/bin/cat", "/etc/motd"], "WorkingDir": "/"})
