"""What nsfs tells people and scripts: progress, entries of an image, layers, images.

Made in the worker, shown by the command line, unchanged on the way; part of the control API, so a field may be added
with a default and nothing else. All sizes are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from msgspec import Meta, Struct, field

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

MOST: Final = 1 << 53
"""Integers up to here are exact wherever JSON is read (RFC 8259, section 6)."""
Count: TypeAlias = Annotated[int, Meta(ge=0, le=MOST)]
"""Bytes, or things. Whatever is decoded as one is so: sums of what hostile workers say can be sent on."""

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def render_size(size: int) -> str:
    """`size` bytes for people: 0 B, 1.5 KiB, 20.3 MiB."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS))
    return f"{size / (1 << 10 * power):.1f} {_UNITS[power - 1]}"


def render_count(count: int, thing: str) -> str:
    """So many of a thing: 1 layer, 2 layers."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


class Progress(Struct, tag="progress", kw_only=True):
    """How far a long piece of work is; sent a few times a second."""

    stage: str
    """resolve, index, map, mount, evict."""
    what: str
    """For people: a short layer digest, a path."""
    done: int = 0
    total: int = 0
    """Bytes; 0 if not known."""


class Phases(Struct, kw_only=True):
    """How long a mount took, in seconds: one after the other."""

    resolve: float
    """Until it was known what the image is."""
    index: float
    """Until all that is shown of it was there."""
    mount: float
    """Until it was shown."""


class Note(Struct, tag="note", kw_only=True):
    """One sentence for people, such as what a download is about to cost."""

    text: str


class Cost(Struct, kw_only=True):
    """What one server cost: a registry, or where one redirected to, or its token server."""

    server: Annotated[str, Meta(max_length=300)]
    """Host and port, as asked."""
    requests: Count
    received: Count
    """Bytes of bodies."""

    def plus(self, other: Cost) -> Cost:
        """Both, under this one's name."""
        requests, received = self.requests + other.requests, self.received + other.received
        return Cost(server=self.server, requests=min(requests, MOST), received=min(received, MOST))


MAX_SERVERS: Final = 256
"""That are told apart for one owner: a registry may redirect each request to a server of a new name."""
OTHERS: Final = "others"
"""What the servers beyond are called."""


def plan_costs(known: Collection[str], costs: Iterable[Cost]) -> list[Cost]:
    """`costs` by server, sorted; beside those that are `known`, servers have names of their own while there are few."""
    names = set(known)
    total: dict[str, Cost] = {}
    for cost in costs:
        name = cost.server if cost.server in names or len(names) < MAX_SERVERS else OTHERS
        names.add(name)
        total[name] = total.get(name, Cost(server=name, requests=0, received=0)).plus(cost)
    return [total[name] for name in sorted(total)]


class Data(Struct, tag="data"):
    """A piece of a file's content (Read)."""

    data: bytes


class Part(Struct, tag="part", kw_only=True):
    """What the Data behind it are bytes of, up to the next one (Export)."""

    media_type: str
    """Of `format.artifact`."""
    layer: str = ""
    """The blob that it is about; "" for what is about the image."""


class EntryReport(Struct, kw_only=True):
    """One file of an image; names are bytes, as a layer may hold any but slash and NUL."""

    path: bytes
    """Absolute inside the image."""
    kind: str
    """file, directory, symlink, character, block, fifo, socket."""
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    target: bytes = b""
    """Of a symlink."""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    layer: str = ""
    """Digest of the blob it comes from."""


class Item(Struct, tag="item"):
    """One entry of a listing (List, Tree), sent as it is known."""

    entry: EntryReport


class LayerReport(Struct, kw_only=True):
    """One layer as `nsfs inspect` shows it, lowest first."""

    digest: str
    media_type: str
    size: int
    """Of the blob."""
    diff_id: str
    format: str
    """estargz, tar+gzip, tar+zstd, tar, or what it is instead."""
    lazy: bool
    """Its content can be fetched by ranges now."""
    why: str
    """Why it is lazy or not, in one sentence."""
    verified: str
    """Against what its content is or was verified."""
    indexed: bool
    """This domain has its index."""
    stream_size: int = 0
    """Uncompressed; 0 if not known yet."""
    files: int = 0
    local: int = 0
    """Bytes of its content that are in the pool."""


class ProfileReport(Struct, kw_only=True):
    """What is known of an image's starts."""

    recorded: float
    """When, in seconds since the epoch."""
    seconds: float
    """That the start took which was recorded."""
    runs: Count
    size: Count
    """Bytes that it read."""
    flaw: str = ""
    """Why something may be missing; empty where nothing is."""


class ImageReport(Struct, kw_only=True):
    """`nsfs inspect`."""

    reference: str
    """Complete: registry, repository, tag or digest."""
    digest: str
    """Of the manifest for the platform."""
    platform: str
    size: int
    """Sum of the layers' blobs."""
    domain: str
    layers: list[LayerReport]
    config: dict[str, Any] = field(default_factory=dict)
    """The image configuration's `config` object: Env, Cmd, Entrypoint, …"""
    profile: ProfileReport | None = None
    """None where no start was recorded."""
