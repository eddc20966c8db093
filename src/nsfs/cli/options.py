"""Arguments that several commands take, and how words on the command line become requests' fields. Pure but for paths.

An image's path is written REF:/path. A registry's reference never holds ":/", so the first one ends it; behind "oci:"
the layout's directory may be absolute, so there the search begins after that prefix.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from nsfs.errors import UsageError
from nsfs.serve.api import ImageRequest, PathRequest

if TYPE_CHECKING:
    from collections.abc import Callable

_LAYOUT = "oci:"


@dataclass(frozen=True, slots=True)
class ImagePath:
    """REF:/path, taken apart; `text` is what was typed."""

    reference: str
    path: bytes
    text: str


def parse_image_path(text: str) -> ImagePath:
    """REF:/path, or REF alone for its root; raises UsageError."""
    skip = len(_LAYOUT) if text.startswith(_LAYOUT) else 0
    cut = text.find(":/", skip)
    reference, path = (text, "/") if cut < 0 else (text[:cut], text[cut + 1 :])
    if len(reference) <= skip:
        raise UsageError(f"no image in front of the path: {text!r}", hint="write REF:/path, such as python:3.12:/etc")
    return ImagePath(absolute_reference(reference), os.fsencode(path), text)


def absolute_reference(reference: str) -> str:
    """`reference`, with the directory of an OCI layout made absolute: the daemon's working directory is another."""
    if not reference.startswith(_LAYOUT):
        return reference
    return _LAYOUT + os.path.abspath(reference[len(_LAYOUT) :])


def mount_point(path: str) -> str:
    """The absolute path that the kernel knows `path` by, without asking the filesystem that is mounted there."""
    parent, name = os.path.split(os.path.abspath(path))
    point = os.path.join(os.path.realpath(parent), name)
    try:
        os.readlink(point)
    except OSError:
        return point
    return os.path.realpath(point)


@dataclass(frozen=True, slots=True)
class Choice:
    """What --namespace, --isolation and --platform say."""

    namespace: str
    isolation: str | None
    platform: str | None

    def image(self, reference: str) -> ImageRequest:
        """Name an image as they say."""
        return ImageRequest(reference=absolute_reference(reference), **asdict(self))

    def path(self, image_path: ImagePath) -> PathRequest:
        """Name a path in an image as they say."""
        return PathRequest(reference=image_path.reference, path=image_path.path, **asdict(self))


_IMAGE_OPTIONS = (
    click.option("-n", "--namespace", default="default", show_default=True, metavar="NS", help="On whose behalf."),
    click.option("--isolation", metavar="SCOPE", help="shared, isolated or pod. [the daemon's choice]"),
    click.option("--platform", metavar="P", help="os/architecture[/variant]. [the host's]"),
)


def image_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --namespace, --isolation and --platform; `command` gets them as one keyword, `choice`."""

    @functools.wraps(command)
    def chosen(*args: object, namespace: str, isolation: str | None, platform: str | None, **others: object) -> None:
        command(*args, choice=Choice(namespace, isolation, platform), **others)

    for option in reversed(_IMAGE_OPTIONS):
        chosen = option(chosen)
    return chosen


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
