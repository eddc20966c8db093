"""What the daemon and a domain's worker say to each other, over the socket pair between them.

All structs are msgpack on the wire (`serve.wire`). Requests that take long report Progress and Note on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from nsfs.errors import CorruptError, UsageError
from nsfs.model.cache import HeldImage, HeldLayer  # noqa: TC001  msgspec looks them up when it decodes
from nsfs.model.policy import parse_view_name, view_name
from nsfs.model.report import MAX_SERVERS, Cost, Count, Data, Item, Note, Part, Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

OnTheWay: TypeAlias = Progress | Note | Item | Part | Data
"""What a worker reports before its result."""


class Prepare(Struct, kw_only=True):
    """Resolve an image, index every layer, build every map. Answered by Prepared."""

    reference: str
    platform: str | None = None
    owner: str = ""
    """On whose behalf: `policy.owner_name`. As it is of all calls that name an image."""
    trust: str = "off"
    """Which artifact beside the image is believed: `policy.parse_trust`. As it is of these calls."""
    profile: str = "off"
    """What is done with the image's profile: `model.profile.ProfileUse`."""


class MapInfo(Struct, frozen=True, kw_only=True):
    """One layer's map."""

    id: str
    path: str
    """Of the map's file in the domain's directory."""
    marks: bool
    """Has whiteouts or opaque marks."""
    opaque: bool = False
    """Its root hides all layers below."""
    owner: tuple[int, int] = (0, 0)
    """(uid, gid) of its root."""
    reader: str = ""
    """As whom its view asks for what is absent, where several share the domain; "" where nothing is."""


class Prepared(Struct, kw_only=True):
    """An image that can be mounted."""

    reference: str
    digest: str
    platform: str
    files: Count
    size: Count
    """Uncompressed bytes of regular files."""
    maps: list[MapInfo]
    """Top first."""
    config: dict[str, Any] = field(default_factory=dict)
    recording: str = ""
    """What is to be in the names of views that are recorded."""
    read_ahead: Count = 0
    """KiB that the kernel may read beyond what it is asked for of its views, at first; 0 for as many as ever."""
    warm: list[tuple[Count, Count]] = field(default_factory=list)
    """What of a start's reads is local: address and size, in the order of first use."""
    indexing: float = 0.0
    """Seconds that this took once it was known what the image is."""


class Views(Struct, kw_only=True):
    """Show (ShowViews) or take away (HideViews) `maps/<view>` and `disks/<view>` for each name."""

    names: list[str]


class Tree(Struct, kw_only=True):
    """Show (or take away) `trees/<id>`: the union of maps, top first, read with the patience of `suffix`."""

    id: str
    maps: list[MapInfo]
    suffix: str = ""
    recording: str = ""
    info: dict[str, str | int | bool] = field(default_factory=dict)
    """What `.nsfs/mount.json` says beside the usage: `MountRecord.describe`."""

    def views(self) -> list[str]:
        """Names of the views that it is read by, in the order of its maps."""
        return [view_name(info.id, self.suffix, info.reader, self.recording) for info in self.maps]


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


class Waits(Struct, kw_only=True):
    """Reads that wait for the network now."""

    waiting: Count = 0
    """How many."""
    longest: float = 0.0
    """Seconds that the first of them has waited."""
    reason: str = ""
    """For what."""


class StartReport(Struct, kw_only=True):
    """What is done now for a start of an image."""

    how: str
    """recorded, prefetched (by its profile), pack (by the artifact beside it)."""
    done: Count
    """Bytes that were read, or are here."""
    total: Count = 0
    """Of so many; 0 where nobody knows."""


class UsageReport(Waits, kw_only=True):
    """What is local of some maps, and what that cost."""

    local: Count
    """Bytes of their contents in the pool."""
    fetched: Count
    """Bytes fetched over the network for their blobs, for whichever map, since the domain's worker started."""
    state: str
    """ready, or what their readers wait for."""
    completing: bool = False
    """What is absent of one of their layers is being fetched in the background."""
    start: StartReport | None = None
    """Of an image with exactly these maps' layers; None where nothing is done."""


def render_mount(info: Mapping[str, str | int | bool], usage: UsageReport) -> bytes:
    """The content of a mount's own `.nsfs/mount.json`: what `nsfs status --json` says of it."""
    report = {**info, **msgspec.structs.asdict(usage)}
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


class StatusRequest(Struct, kw_only=True):
    """Ask how a domain stands. Answered by WorkerStatus."""

    measured: bool = True
    """Say how many bytes are local, too, which takes a look at every file."""


class WorkerStatus(Waits, kw_only=True):
    """A domain's figures."""

    layers: Count
    local: Count
    fetched: Count
    state: str
    bugs: Count = 0
    """That its log tells of since the worker started."""
    unkept: str = ""
    """Why what is fetched is not kept; empty where it is."""
    profiles: Count = 0
    """Of images' starts, that are kept."""
    recorded: Count = 0
    """Starts that are recorded now."""
    prefetching: Count = 0
    """Starts whose profile is being fetched now."""
    prefetched: Count = 0
    """Bytes of profiles that were fetched ahead since the worker started."""


class Name(Struct, kw_only=True):
    """Names an image: for Inspect (answered by ImageReport), Evict (Evicted), Check (Checked) and Export (Exported)."""

    reference: str
    platform: str | None = None
    owner: str = ""
    trust: str = "off"


class LayerName(Struct, frozen=True, kw_only=True):
    """Names a layer of an image: for Offer (answered by Empty) and Await (answered by Indexed).

    Offer begins to index every layer of the image, and is answered when that has begun.
    """

    reference: str
    """The image, by its manifest's digest."""
    blob: str
    chain: str
    owner: str = ""
    trust: str = "off"


class Indexed(Struct, kw_only=True):
    """A layer's index is complete."""

    verified: str
    """Against what: "diff-id", "toc"."""
    needs_lower: bool
    """It cannot be shown without the layers below."""


class Checked(Struct, kw_only=True):
    """The layers of an image, every one of which can be served on demand: the answer to Check, which indexes none."""

    layers: list[LayerName]


class Stack(Struct, kw_only=True):
    """Have layers of one stack indexed and mapped. Answered by Stacked."""

    layers: list[LayerName | None]
    """Lowest first; None for a layer that is not ours. All of one owner."""
    starter: str = ""
    """For whom: the same one may ask again, before anything is mounted."""
    profile: str = "off"
    """What is done with the image's profile: `model.profile.ProfileUse`."""


class Stacked(Struct, kw_only=True):
    """The maps of a Stack's own layers, lowest first."""

    maps: list[MapInfo]
    recording: str = ""
    """What is to be in the names of views that are recorded."""
    read_ahead: Count = 0
    warm: list[tuple[Count, Count]] = field(default_factory=list)
    """Both as of `Prepared`."""


def check_maps(answer: Prepared | Stacked, owner: str) -> None:
    """Refuse what no worker of ours answers to whom asks for `owner`: names of something else, or other readers.

    Whoever reads a view of a shared domain is who has an own worker that the domain's may ask. Raises CorruptError.
    """
    for info in answer.maps:
        try:
            reader = parse_view_name(view_name(info.id, "", info.reader, answer.recording)).reader
        except UsageError as error:
            raise CorruptError(f"a worker names no map: {info.id[:100]!r}") from error
        if reader not in {"", owner}:
            raise CorruptError(f"a worker says that a map is read by somebody else: {reader}")


class PathName(Name, kw_only=True):
    """Names a path in an image: for List and Tree (Items), Stat (EntryReport), Read (Data)."""

    path: bytes
    offset: int = 0
    length: int | None = None


class Held(Struct, kw_only=True):
    """What a domain's pool holds: the answer to Held."""

    layers: list[HeldLayer]
    images: list[HeldImage]


class Keep(Struct, kw_only=True):
    """Keep what is fetched, or, where `unless` says why, nothing more of it. Answered by Empty."""

    unless: str = ""


class Drop(Struct, kw_only=True):
    """Give up the contents of layers that Held named, unless they are used again meanwhile. Answered by Evicted.

    Those that wait for their checkpoints stay; Settle (Empty, answered by Evicted) makes these.
    """

    layers: list[HeldLayer]


class Pinned(Struct, kw_only=True):
    """An image is pinned (Pin) or no longer (Unpin)."""

    reference: str
    digest: str
    absent: Count
    """Bytes that are still to be fetched."""


class Offline(Struct, kw_only=True):
    """What an image would want of its registry: the answer to Offline."""

    reference: str
    missing: list[str]
    """A sentence for each layer that is not whole; nothing if it is complete."""
    absent: Count
    """Bytes of contents, of layers that were read."""


class Exported(Struct, kw_only=True):
    """What may lie beside this image was reported, by Parts with their Data: the answer to Export."""

    reference: str
    digest: str


class Evicted(Struct, kw_only=True):
    """What eviction freed."""

    layers: Count
    freed: Count


class Costs(Struct, kw_only=True):
    """What an owner's worker has asked of servers since it was last asked so: the answer to TakeCosts."""

    costs: Annotated[list[Cost], Meta(max_length=2 * MAX_SERVERS)]


class SharesRequest(Struct, kw_only=True):
    """Ask what each namespace has of a domain that several share. Answered by Shares."""

    used: dict[str, list[str]]
    """The maps that mounts stand on, by namespace."""


class Share(Struct, kw_only=True):
    """What a namespace, its tenants included, has of a domain that several share."""

    namespace: str
    granted: Count
    """Blobs that it may have now."""
    local: Count
    """Bytes of contents that are there, each once: of layers that it was ever granted and not refused since, and of
    those that it has mounted."""


class Shares(Struct, kw_only=True):
    """The answer to SharesRequest: those of all namespaces with any."""

    shares: list[Share]


class CredentialRequest(Struct, kw_only=True):
    """Worker to daemon: as whom to ask a registry. Answered by CredentialAnswer."""

    host: str
    repository: str
    again: bool = False
    """What was answered before was refused."""


class CredentialAnswer(Struct, kw_only=True):
    """What the worker's own namespace has there."""

    known: bool = False
    """Otherwise it asks as nobody."""
    username: str = ""
    password: str = ""
    identity_token: str = ""
    life: float | None = None
    """Seconds after which it is to be asked for again."""

    def __repr__(self) -> str:
        """Without a secret."""
        return f"CredentialAnswer(known={self.known})"


class Empty(Struct):
    """No parameters, or no result."""
