"""The control API: what the command line and the daemon say to each other.

One gRPC service, `nsfs.v1.Control`, on the daemon's socket; every method takes one request and answers with a stream of
events that ends with one `Done` (or with an error: its gRPC status is the error's `code`, its details are a `Failure`
as JSON). Messages are msgpack, checked against these classes on both sides. Unknown fields are ignored, so a
field may be added with a default; anything else needs a new `VERSION`, and a daemon serves the one before, too.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from nsfs.core.worker_api import UsageReport, WorkerStatus
from nsfs.model.cache import CachedImage  # noqa: TC001  msgspec looks it up when it decodes
from nsfs.model.report import Cost, Data, EntryReport, ImageReport, Item, Note, Part, Phases, Progress

SERVICE = "nsfs.v1.Control"
VERSION = 1


class ImageRequest(Struct, kw_only=True):
    """Names an image as a namespace sees it; the base of most requests.

    `reference` is what the user typed, except that an `oci:` layout's path is absolute. `isolation` is None (the
    policy's choice), "shared", "isolated" or "pod". `platform` is os/architecture[/variant], None for the host's.
    `plugin` is containerd's name for the snapshotter, where it is about a container's image.
    """

    reference: str
    namespace: str = "default"
    isolation: str | None = None
    platform: str | None = None
    plugin: str = ""


class ExplainRequest(Struct, kw_only=True):
    """Ask what a mount of an image would share, and why. `plugin` and `label` are a container's."""

    reference: str
    namespace: str = "default"
    plugin: str = ""
    label: str | None = None
    isolation: str | None = None


class MountRequest(ImageRequest, kw_only=True):
    """Mount an image at `target`, an absolute path of an existing directory."""

    target: str
    driver: str = "auto"
    """auto, erofs, erofs-loop or fuse."""
    writable: bool = False
    on_error: str = ""
    """wait, wait:<seconds>s or eio; empty for the daemon's `on_error`."""
    profile: str = "use"
    """record, use or off: what is done with what a start of the image reads."""


class UmountRequest(Struct, kw_only=True):
    """Take away what a MountRequest put at `target`."""

    target: str
    force: bool = False


class PathRequest(ImageRequest, kw_only=True):
    """Names a path inside an image: for List, Stat, Read and Tree."""

    path: bytes
    """Absolute inside the image's root; symlinks are followed inside it, the last component's too for List and Read."""
    offset: int = 0
    length: int | None = None
    """Read: to the end if None."""


class Empty(Struct):
    """For Version and Status."""


class Done(Struct, tag="done"):
    """The result, packed: `RESULTS[method]` says of which class."""

    result: bytes


Event: TypeAlias = Progress | Note | Data | Item | Part | Done


class Failure(Struct, kw_only=True):
    """An error that crosses a socket; `code` finds the class in `nsfs.errors.ERRORS`."""

    code: str
    message: str
    hint: str | None = None


class VersionReport(Struct, kw_only=True):
    """Who answers."""

    version: str
    api: int
    pid: int
    private: bool
    """A user's private daemon, which ends with its last mount."""
    incarnation: str = ""
    """Another for each daemon, also where it has the process ID of the one before."""
    build: str = ""
    """Of what code it is (`serve.build`)."""
    outdated: list[str] = []
    """Domains whose workers are of older code, and are about to be replaced."""
    kept_back: list[str] = []
    """Domains whose workers are of older code, and stay, since newer ones did not answer."""


class DrainRequest(Struct, kw_only=True):
    """End the daemon and all that it has mounted; `force` where somebody uses it, too."""

    force: bool = False


class Drained(Struct, kw_only=True):
    """What ended."""

    mounts: int
    containers: int
    """Whose snapshots lost their views."""


class UpgradeReport(Struct, kw_only=True):
    """Builds (`serve.build`): of the daemon that answered, and of what takes its place."""

    was: str
    build: str


class MountReport(UsageReport, kw_only=True):
    """One manual mount as `nsfs status` shows it, with what is local of its image."""

    id: str
    target: str
    reference: str
    digest: str
    namespace: str
    domain: str
    driver: str
    writable: bool
    files: int
    size: int
    """Uncompressed bytes of the image's regular files."""
    phases: Phases | None = None
    """Of one that was just made."""


class PoolsReport(Struct, kw_only=True):
    """What all pools take together, as it was at the last look. Bytes."""

    used: int
    """On disk, their indexes included."""
    cap: int
    free: int
    """What the filesystem has left."""
    reserve: int
    state: str
    """ready, or what is short."""


class DomainReport(WorkerStatus, kw_only=True):
    """One domain."""

    name: str
    pid: int
    """Of its worker; 0 if none runs."""


class StatusReport(Struct, kw_only=True):
    """`nsfs status`."""

    version: str
    private: bool
    root: str
    pools: PoolsReport
    mounts: list[MountReport]
    domains: list[DomainReport]


class ExplainReport(Struct, kw_only=True):
    """`nsfs policy explain`."""

    reference: str
    namespace: str
    plugin: str
    scope: str
    domain: str
    """Empty where nothing of the image is on this host."""
    rule: str
    """What decided."""
    reasons: list[str]
    """Everything that had a say, in order."""
    policy: str
    """The file of rules; empty for none."""
    follows: dict[str, str]
    """What the decision means: what is shared, who can see what, and the like, a sentence each."""
    sharers: list[str]
    """Who else the policy puts into this domain."""


class NamespaceRequest(Struct, kw_only=True):
    """Names a namespace. `force`: end it though somebody uses it."""

    namespace: str
    force: bool = False


class NamespaceDomain(Struct, kw_only=True):
    """One domain, as a namespace has it."""

    name: str
    own: bool
    """Nobody else's, and ends with the namespace."""
    pid: int
    """Of its worker; 0 if none runs."""
    uid: int
    """Whose its files are, and as whom its worker runs."""
    encrypted: bool
    disk: int
    """Bytes that it takes on disk, its indexes included."""
    used: int
    """Of a shared domain: bytes there, each once, of layers that the namespace, its tenants included, was granted and
    not refused since, or has mounted, whoever had them fetched. Of its own: all of `disk`."""
    fetched: int
    """Bytes fetched over the network since its worker started."""
    grants: int
    """Blobs of a shared domain that the namespace, its tenants included, may have now."""
    state: str
    quota: int = 0
    """Bytes that it may take, where it is the namespace's or a tenant's own; 0 where nothing is said."""


class NamespaceReport(Struct, kw_only=True):
    """What is here on behalf of one namespace."""

    namespace: str
    containerd: bool
    """containerd asked on its behalf."""
    domains: list[NamespaceDomain]
    mounts: list[str]
    """Where it is mounted by hand."""
    snapshots: int
    containers: list[str]
    """containerd's keys of those snapshots that somebody uses."""
    quota: int
    """Bytes that the pool of its own domain may take; 0 where nothing is said."""
    own: int
    """Bytes on disk of its own domains."""
    shared: int
    """Bytes that it uses of domains that it shares, whoever had them fetched."""
    fetched: int
    """Bytes fetched for its own domains since their workers started."""
    costs: list[Cost] = []
    """What its requests to registries cost so far, those for shared domains included, by server."""
    logins: list[str] = []
    """Who of it, itself and its tenants, has credentials that `nsfs login` keeps."""


class NamespacesReport(Struct, kw_only=True):
    """`nsfs ns ls`."""

    namespaces: list[NamespaceReport]


class NamespaceEnded(Struct, kw_only=True):
    """What went with a namespace."""

    namespace: str
    mounts: int
    snapshots: int
    domains: list[str]
    freed: int
    """Bytes of disk."""


class CacheReport(PoolsReport, kw_only=True):
    """`nsfs cache ls`. Looks before."""

    images: list[CachedImage]


class PruneRequest(Struct, kw_only=True):
    """Have contents go that nobody stands on, nor did in the last `older` seconds."""

    older: float = 0.0
    dry_run: bool = False


class PruneReport(Struct, kw_only=True):
    """What went, or would."""

    layers: int
    freed: int


class PinReport(Struct, kw_only=True):
    """An image is pinned, or no longer."""

    reference: str
    digest: str
    absent: int
    """Bytes of it that are still to be fetched; that goes on in the background."""


class OfflineReport(Struct, kw_only=True):
    """`nsfs offline`."""

    reference: str
    complete: bool
    """It needs no registry."""
    missing: list[str]
    absent: int


class EvictReport(Struct, kw_only=True):
    """What `nsfs evict` did."""

    layers: int
    freed: int


class ExportReport(Struct, kw_only=True):
    """What all parts that were sent are about."""

    reference: str
    """Complete: registry, repository, tag or digest."""
    digest: str
    """Of the manifest for the platform."""


class LoginRequest(Struct, kw_only=True):
    """Keep a credential for a namespace, once its registry has accepted it."""

    registry: str
    namespace: str = "default"
    """Or namespace/tenant."""
    username: str
    password: str

    def __repr__(self) -> str:
        """Without the secret."""
        return f"LoginRequest({self.registry!r}, {self.namespace!r}, {self.username!r})"


class LogoutRequest(Struct, kw_only=True):
    """Forget it."""

    registry: str
    namespace: str = "default"


class LoginReport(Struct, kw_only=True):
    """Who is logged in where now."""

    registry: str
    namespace: str
    username: str


METHODS: dict[str, tuple[type, type]] = {
    "Version": (Empty, VersionReport),
    "Status": (Empty, StatusReport),
    "Mount": (MountRequest, MountReport),
    "Umount": (UmountRequest, Empty),
    "Index": (ImageRequest, ImageReport),
    "Inspect": (ImageRequest, ImageReport),
    "Export": (ImageRequest, ExportReport),
    "List": (PathRequest, Empty),
    "Tree": (PathRequest, Empty),
    "Stat": (PathRequest, EntryReport),
    "Read": (PathRequest, Empty),
    "Evict": (ImageRequest, EvictReport),
    "Cache": (Empty, CacheReport),
    "Prune": (PruneRequest, PruneReport),
    "Pin": (ImageRequest, PinReport),
    "Unpin": (ImageRequest, PinReport),
    "Offline": (ImageRequest, OfflineReport),
    "Explain": (ExplainRequest, ExplainReport),
    "Namespaces": (Empty, NamespacesReport),
    "Namespace": (NamespaceRequest, NamespaceReport),
    "EndNamespace": (NamespaceRequest, NamespaceEnded),
    "Drain": (DrainRequest, Drained),
    "Upgrade": (Empty, UpgradeReport),
    "Login": (LoginRequest, LoginReport),
    "Logout": (LogoutRequest, Empty),
}
"""Request and result class by method. List and Tree answer by `Item`s, Read by `Data`, Export by `Part`s with
`Data` behind each, before the result."""
