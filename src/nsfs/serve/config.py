"""The configuration: one frozen value, read once from TOML.

Owns every key, its default and its check; `contrib/config.toml` lists the same keys with the same defaults. Refuses
unknown keys (and names the nearest known one), so that a typing error never means a silent default. Where the files
of a user's private daemon lie follows the XDG base directory specification 0.8. No concurrency: values only.

Invariants of a Config that exists: paths are absolute, numbers are in range, `socket` is set.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

import msgspec
from msgspec import Meta, Struct

from nsfs.errors import DeniedError, NotFoundError, NsfsError, UsageError
from nsfs.model.encryption import Encrypt
from nsfs.model.policy import Isolation, check_owner, parse_patience
from nsfs.model.uids import parse_uid_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SYSTEM_CONFIG = "/etc/nsfs/config.toml"
"""What `nsfs serve` reads where no --config is given, if it is there."""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Prepare = Literal["lenient", "strict"]

_NAMESPACES = "namespace"
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATIONS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Size(int):
    """Bytes; in TOML a whole number, alone or with B, KiB, MiB, GiB or TiB behind it."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read `value`; raises ValueError."""
        found = re.fullmatch(r"(\d{1,15}) ?(B|[KMGT]iB)?", str(value))
        if found is None or isinstance(value, bool):
            raise ValueError(f'not a size such as "64MiB": {value!r}')
        return cls(int(found[1]) * _SIZES[found[2] or ""])


class Duration(float):
    """Seconds; in TOML a number, alone or with ms, s, m, h or d behind it."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read `value`; raises ValueError."""
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|s|m|h|d)?", str(value))
        if found is None or isinstance(value, bool):
            raise ValueError(f'not a duration such as "60s": {value!r}')
        return cls(float(found[1]) * _DURATIONS[found[2] or ""])


Count = Annotated[int, Meta(ge=1, le=1024)]
Part = Annotated[float, Meta(gt=0, le=1)]
LEAST_MEMORY = 256 << 20
"""Of a worker, most of it its threads' stacks, which take addresses and no memory."""


class Registry(Struct, frozen=True, kw_only=True):
    """How registries are reached."""

    config_path: str = "/etc/containerd/certs.d"
    """Directory of <host>/hosts.toml files, as containerd reads it: mirrors, certificates, plain HTTP."""
    docker_config: str = ""
    """The host's credentials; empty for $DOCKER_CONFIG/config.json, else ~/.docker/config.json."""
    docker_config_for: Literal["default", "all"] = "default"
    """Who asks with the host's credentials, where it has none of its own: the namespace `default`, or every one."""
    connect_timeout: Duration = Duration(10)
    """To connect, TLS included, per attempt."""
    read_timeout: Duration = Duration(30)
    """Without a byte from the registry, or with fewer than 16 KiB a second, per attempt."""
    connections: Count = 24
    """At most so many to one registry server, per domain: half for whole layers, half for ranges and documents."""


class Fetch(Struct, frozen=True, kw_only=True):
    """How absent content is fetched."""

    concurrency: Count = 12
    """Ranges that are asked of one registry at one time, per domain; no more than it may have connections for."""
    read_ahead: Size = Size(4 << 20)
    """Fetched beyond what a sequential reader asks for; 0 for nothing."""
    complete: bool = False
    """Fetch the rest of what is in use, once nobody waited for a read for a while; of pinned images, in any case."""
    complete_rate: Size = Size(0)
    """Bytes a second that either may take, per domain; 0 for as many as come while nobody reads what is absent."""


class Pool(Struct, frozen=True, kw_only=True):
    """How much disk all pools together take."""

    max_bytes: Size = Size(0)
    """The cap; 0 for 60 % of what was free when nsfs first started here."""
    reserve: Size = Size(1 << 30)
    """Free space of the filesystem that is not used."""
    high: Part = 0.95
    """Part of the cap beyond which contents go, those used last a long time ago first."""
    low: Part = 0.85
    """Part of the cap that is left then."""


class Kernel(Struct, frozen=True, kw_only=True):
    """Kernel features that nsfs uses where the kernel has them; false forces the way without."""

    erofs: bool = True
    """Mount layers as EROFS (Linux 5.16); else each is a FUSE tree of its own."""
    file_backed: bool = True
    """Mount EROFS from files (Linux 6.12); else over loop devices."""
    directio: bool = True
    """Read EROFS past the page cache of the files below it (Linux 6.13); else every page is kept twice."""
    resend: bool = True
    """Have the kernel repeat what a dead worker left unanswered (Linux 6.9); else these reads fail, once."""
    idmap: bool = True
    """Shift owners by idmapped mounts (Linux 5.19), for containers in user namespaces; else these are refused."""


class Containerd(Struct, frozen=True, kw_only=True):
    """The containerd whose snapshotter this is."""

    address: str = "/run/containerd/containerd.sock"
    """Its socket: images whose layers turn out not to be what they say are taken back there, namespaces that are
    deleted there end here; `nsfs pull` uses it. Empty for none."""
    profile: Literal["first", "use", "off"] = "first"
    """first: note what the first start of an image reads, and fetch that ahead at later ones. use: only the latter."""


class Metrics(Struct, frozen=True, kw_only=True):
    """Figures for Prometheus."""

    listen: str = ""
    """Where they are served: ADDRESS:PORT, or unix:PATH; empty for nowhere."""


class Namespace(Struct, frozen=True, kw_only=True):
    """What is particular to one namespace: a table [namespace.<name>], or [namespace."<name>/<tenant>"]."""

    docker_config: str = ""
    """File with the namespace's credentials, its own; empty for the one that `nsfs login -n` keeps."""
    netns: str = ""
    """Path of the network namespace from which its registries are asked; empty for the host's."""
    resolv_conf: str = ""
    """How names are resolved there; empty for /etc/netns/<name>/resolv.conf where it is there, else the host's."""
    cgroup: str = ""
    """The cgroup for which its work counts, as /proc/PID/cgroup names it; empty for the daemon's."""
    connections: Annotated[int, Meta(ge=0, le=1024)] = 0
    """At most so many to one registry server on the namespace's behalf; 0 for `registry.connections`."""
    memory: Size = Size(0)
    """Private memory that its worker, and each of its jobs, may have (setrlimit(2), RLIMIT_DATA); 0 for jobs' 4 GiB."""
    quota: Size = Size(0)
    """Disk that the namespace's own pool may take; 0 for no limit but the cap of all."""
    credential_provider: tuple[str, ...] = ()
    """Program and arguments, asked for what that file does not know: a kubelet credential provider, version v1."""


class Config(Struct, frozen=True, kw_only=True):
    """All of it."""

    root: str = "/var/lib/nsfs"
    """State: pools, indexes, upper directories. On a local filesystem with sparse files (ext4, xfs, btrfs)."""
    run: str = "/run/nsfs"
    """What does not outlive a boot: mount points, sockets."""
    socket: str = ""
    """The control socket; empty for nsfs.sock in `run`."""
    log_level: LogLevel = "info"
    """debug, info, warning or error."""
    log_format: LogFormat = "text"
    """text or json; on stderr."""
    isolation: Isolation = Isolation.ISOLATED
    """What a mount that does not say gets: shared, isolated, pod or guest."""
    policy: str = ""
    """File of rules that say what shares what, by namespace, image and plugin name; empty for none."""
    trust_index: str = "off"
    """Which artifact beside an image is believed, in domains of one owner: off, same-repository, or its digest."""
    encrypt: Encrypt = Encrypt.ISOLATED
    """What is encrypted on disk: isolated (domains of one namespace or pod), all, or off; domains that begin now."""
    key_file: str = ""
    """A secret of 32 bytes or more that wraps the keys in `root`; empty for systemd's credential nsfs.key, if any."""
    on_error: str = "wait:60s"
    """What a read does where its content cannot be had, for mounts that do not say: wait, wait:<seconds>s or eio."""
    prepare: Prepare = "lenient"
    """What counts as a lazy layer for containerd: lenient, or strict for namespaces that several tenants share."""
    grant_ttl: Duration = Duration(3600)
    """How long, in a domain that several share, a registry's word counts that a namespace may have a layer."""
    prepare_wait: Duration = Duration(0.5)
    """How long a pull of containerd waits for its plain layers that are read for the first time."""
    uid_range: str = "1879048192-1879113727"
    """Uids and gids, FIRST-LAST, that nobody else has: each domain's worker of root's daemon gets one of them."""
    registry: Registry = Registry()
    fetch: Fetch = Fetch()
    pool: Pool = Pool()
    kernel: Kernel = Kernel()
    containerd: Containerd = Containerd()
    metrics: Metrics = Metrics()
    namespace: dict[str, Namespace] = {}

    def of_namespace(self, name: str) -> Namespace:
        """What is particular to namespace `name`."""
        return self.namespace.get(name, Namespace())

    def for_worker(self, owner: str) -> Config:
        """What a worker on behalf of `owner` is to know: what others have is not its business."""
        connections = self.of_namespace(owner).connections or self.registry.connections
        registry = msgspec.structs.replace(self.registry, connections=connections)
        return msgspec.structs.replace(self, registry=registry, namespace={})


def parse_config(text: str, base: Config | None = None, source: str = "configuration") -> Config:
    """`base` (the defaults) with what the TOML document `text` says; raises UsageError that names key and `source`."""
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is no TOML: {error}") from None
    _refuse_unknown(said, source)
    whole = _overlay(msgspec.to_builtins(base or Config(), builtin_types=(Size, Duration)), said)
    try:
        config = msgspec.convert(whole, Config, dec_hook=_parse_unit)
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {tidy(str(error))}") from None
    return _complete(config, source)


def load_config(path: str, base: Config | None = None) -> Config:
    """The file at `path`; raises NotFoundError, DeniedError, UsageError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise NotFoundError(f"no such configuration: {path}") from None
    except PermissionError:
        raise DeniedError(f"configuration is not readable: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration is not readable: {path}: {error}") from None
    return parse_config(text, base, path)


def load_system_config() -> Config:
    """SYSTEM_CONFIG where it is there, else the defaults."""
    try:
        return load_config(SYSTEM_CONFIG)
    except NotFoundError:
        return _complete(Config(), "defaults")


def load_private_config(environ: Mapping[str, str], uid: int) -> Config:
    """What a user's private daemon runs by: XDG places, and $XDG_CONFIG_HOME/nsfs/config.toml where it is there."""
    base = Config(root=f"{_data_home(environ)}/nsfs", run=private_run(environ, uid))
    try:
        return load_config(f"{_xdg(environ, 'XDG_CONFIG_HOME', '.config')}/nsfs/config.toml", base)
    except NotFoundError:
        return _complete(base, "defaults")


def private_run(environ: Mapping[str, str], uid: int) -> str:
    """The run directory of a user: in $XDG_RUNTIME_DIR, or in /tmp, where whoever makes it must check its owner."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/nsfs" if runtime.startswith("/") else f"/tmp/nsfs-{uid}"  # noqa: S108  checked where it is made


def private_log(environ: Mapping[str, str]) -> str:
    """Where a user's private daemon writes its log."""
    return f"{_xdg(environ, 'XDG_STATE_HOME', '.local/state')}/nsfs/daemon.log"


def pack_config(config: Config) -> bytes:
    """For another process of ours; `unpack_config` reads it."""
    return msgspec.msgpack.encode(config, enc_hook=lambda value: value.real)


def unpack_config(packed: bytes) -> Config:
    """What `pack_config` wrote."""
    return _decode_config(packed)


def known_keys() -> list[str]:
    """Every key, dotted where it is in a table; those of namespaces' tables are fields of Namespace."""
    return list(_keys(Config))


def _data_home(environ: Mapping[str, str]) -> str:
    return _xdg(environ, "XDG_DATA_HOME", ".local/share")


def _xdg(environ: Mapping[str, str], name: str, default: str) -> str:
    """Relative values are to be ignored, says the specification."""
    value = environ.get(name, "")
    if value.startswith("/"):
        return value.rstrip("/") or "/"
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        raise UsageError(f"no place for nsfs's own files: neither ${name} nor $HOME is an absolute path")
    return f"{home.rstrip('/')}/{default}"


def _keys(struct: type[Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            yield from _keys(field.type, f"{prefix}{field.name}.")
        elif field.name != _NAMESPACES:
            yield prefix + field.name


def _refuse_unknown(said: dict[str, Any], source: str) -> None:
    known = known_keys()
    _refuse_others(_said_keys({key: said[key] for key in said if key != _NAMESPACES}), known, source)
    namespaces = said.get(_NAMESPACES, {})
    if not isinstance(namespaces, dict):
        raise UsageError(f"{source}: a table, not a value: {_NAMESPACES}", hint=f"write [{_NAMESPACES}.<name>]")
    for name, table in namespaces.items():
        prefix = f"{_NAMESPACES}.{_checked(name, source)}."
        _refuse_others(
            _said_keys({name: table}, prefix.removesuffix(f"{name}.")), list(_keys(Namespace, prefix)), source
        )


def _checked(name: str, source: str) -> str:
    try:
        return check_owner(name)
    except UsageError as error:
        raise UsageError(f"{source}: {_NAMESPACES}: {error.message}", hint=error.hint) from None


def _refuse_others(said: Iterable[str], known: list[str], source: str) -> None:
    tables = {key.rpartition(".")[0] for key in known if "." in key}
    for key in said:
        if key in known:
            continue
        if key in tables:
            raise UsageError(f"{source}: a table, not a value: {key}", hint=f"write [{key}]")
        nearest = difflib.get_close_matches(key, known, 1, cutoff=0.0)[0]
        raise UsageError(f"{source}: unknown key: {key}", hint=f"the nearest known one is {nearest}")


def _said_keys(said: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in said.items():
        if isinstance(value, dict) and prefix in {"", f"{_NAMESPACES}."}:
            yield from _said_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _overlay(base: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    return base | {key: base[key] | value if isinstance(value, dict) else value for key, value in said.items()}


def _parse_unit(kind: type, value: object) -> object:
    if issubclass(kind, Size | Duration):
        return kind.parse(value)
    raise NotImplementedError(kind)


_decode_config = msgspec.msgpack.Decoder(Config, dec_hook=_parse_unit).decode


def tidy(message: str) -> str:
    """Turn "Expected `int`, got `str` - at `$.a.b`" into "a.b: expected `int`, got `str`"."""
    what, _, where = message.partition(" - at `$.")
    what = what[:1].lower() + what[1:]
    return f"{where.rstrip('`')}: {what}" if where else what


class Endpoint(NamedTuple):
    """Where something listens: a unix socket, or an address and a port of TCP."""

    path: str
    host: str = ""
    port: int = 0


def parse_endpoint(text: str) -> Endpoint:
    """Read ADDRESS:PORT, the address of IPv6 in brackets, or unix:PATH; raises UsageError."""
    if path := text.removeprefix("unix:") if text.startswith("unix:/") else "":
        _check_socket(path)
        return Endpoint(path)
    host, _, port = text.rpartition(":")
    with suppress(ValueError):
        address = ip_address(host.removeprefix("[").removesuffix("]"))
        written = f"[{address}]" if address.version == 6 else str(address)
        if host == written and port.isdecimal() and 0 < int(port) < 1 << 16:
            return Endpoint("", str(address), int(port))
    raise UsageError(
        f"not an address to listen at: {text!r}", hint='write "127.0.0.1:9464", "[::1]:9464" or "unix:/path"'
    )


def _check_socket(path: str) -> None:
    if len(path.encode()) > 107:
        raise UsageError(f"longer than the 107 bytes of a unix socket's name: {path}")


def _check_paths(name: str, namespace: Namespace, source: str) -> None:
    for key in ("docker_config", "netns", "resolv_conf", "cgroup"):
        if getattr(namespace, key)[:1] not in {"", "/"}:
            raise UsageError(f"{source}: {_NAMESPACES}.{name}.{key}: not an absolute path")


def _complete(config: Config, source: str) -> Config:
    if not config.socket:
        config = msgspec.structs.replace(config, socket=f"{config.run}/nsfs.sock")
    for name, namespace in config.namespace.items():
        _check_paths(name, namespace, source)
    for key in ("root", "run", "socket", "policy", "key_file"):
        if getattr(config, key)[:1] not in ({"/", ""} if key in {"policy", "key_file"} else {"/"}):
            raise UsageError(f"{source}: {key}: not an absolute path: {getattr(config, key)!r}")
    with _naming(source, "socket"):
        _check_socket(config.socket)
    if config.pool.low > config.pool.high:
        raise UsageError(f"{source}: pool.low is above pool.high: {config.pool.low} and {config.pool.high}")
    if config.metrics.listen:
        with _naming(source, "metrics.listen"):
            parse_endpoint(config.metrics.listen)
    _check_memory(config, source)
    with _naming(source, "on_error"):
        parse_patience(config.on_error)
    with _naming(source, "uid_range"):
        parse_uid_range(config.uid_range)
    return config


def _check_memory(config: Config, source: str) -> None:
    for name, namespace in config.namespace.items():
        if 0 < namespace.memory < LEAST_MEMORY:
            raise UsageError(
                f"{source}: {_NAMESPACES}.{name}.memory: less than a worker needs: {namespace.memory} bytes",
                hint=f"at least {LEAST_MEMORY >> 20} MiB",
            )


@contextmanager
def _naming(source: str, key: str) -> Iterator[None]:
    """Say which key an error is about."""
    try:
        yield
    except NsfsError as error:
        raise UsageError(f"{source}: {key}: {error.message}", hint=error.hint) from None
