"""What the daemon and a domain's worker say to each other, over the socket pair between them.

All structs are msgpack on the wire (`serve.wire`). Requests that take long report Progress and Note on the way.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct, field

from nsfs.model.report import Data, Item, Note, Progress

OnTheWay: TypeAlias = Progress | Note | Item | Data
"""What a worker reports before its result."""


class Prepare(Struct, kw_only=True):
    """Resolve an image, index every layer, build every map. Answered by Prepared."""

    reference: str
    platform: str | None = None


class MapInfo(Struct, frozen=True, kw_only=True):
    """One layer's map."""

    id: str
    path: str
    """Of the map's file in the domain's directory."""
    marks: bool
    """Has whiteouts or opaque marks."""


class Prepared(Struct, kw_only=True):
    """An image that can be mounted."""

    reference: str
    digest: str
    platform: str
    files: int
    size: int
    """Uncompressed bytes of regular files."""
    maps: list[MapInfo]
    """Top first."""
    config: dict[str, Any] = field(default_factory=dict)


class Views(Struct, kw_only=True):
    """Show (ShowViews) or take away (HideViews) `maps/<view>` and `disks/<view>` for each name."""

    names: list[str]


class Tree(Struct, kw_only=True):
    """Show (or take away) `trees/<id>`: the union of maps, top first, read with the patience of `suffix`."""

    id: str
    maps: list[MapInfo]
    suffix: str = ""


class TreeGone(Struct, kw_only=True):
    """Take `trees/<id>` away."""

    id: str


class Fetch(Struct, kw_only=True):
    """Make blocks present (a front asks); answered when they are."""

    view: str
    address: int
    size: int


class Usage(Struct, kw_only=True):
    """Ask what of these maps is local. Answered by UsageReport."""

    maps: list[str]


class UsageReport(Struct, kw_only=True):
    """Bytes of the maps' contents in the pool, and fetched over the network for their blobs."""

    local: int
    fetched: int
    state: str


class WorkerStatus(Struct, kw_only=True):
    """A domain's figures."""

    layers: int
    local: int
    fetched: int
    waiting: int
    state: str


class Name(Struct, kw_only=True):
    """Names an image: for Inspect (answered by ImageReport) and Evict (answered by Evicted)."""

    reference: str
    platform: str | None = None


class PathName(Name, kw_only=True):
    """Names a path in an image: for List and Tree (Items), Stat (EntryReport), Read (Data)."""

    path: bytes
    offset: int = 0
    length: int | None = None


class Evicted(Struct, kw_only=True):
    """What eviction freed."""

    layers: int
    freed: int


class Empty(Struct):
    """No parameters, or no result."""
