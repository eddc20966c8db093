"""Who shares with whom: from a namespace, a plugin name, an image and a wish to the domain that serves it.

The only place where a domain's name is made. A domain is one pool, one worker and one set of credentials; below this
decision nothing asks who the tenant is. `decide_scope` is a pure function of the administrator's policy and of what a
request says of itself. It trusts each part as far as its author: policy and plugin name are the administrator's, a wish
comes from root's command line and chooses, a label comes from whoever runs the container and can only tighten.

An image is known here by its complete reference, which may be no more than a claim: whoever serves the decided domain
resolves the image in that very repository before anything of it is shown there.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Final, NamedTuple

from nsfs.errors import DeniedError, UsageError
from nsfs.model.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable

ISOLATION_LABEL: Final = "containerd.io/snapshot/nsfs.isolation"
"""What a container's snapshot may be labelled with, to share less than the policy says."""
PLUGIN: Final = "nsfs"
"""The plugin name that says nothing; `nsfs-<scope>` names a scope, `nsfs-<tenant>` a tenant."""

_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
"""containerd's identifiers (pkg/identifiers, containerd 1.6 to 2.x), at most 76 characters."""


class Isolation(enum.StrEnum):
    """How much a mount shares, from most to least."""

    SHARED = "shared"
    ISOLATED = "isolated"
    POD = "pod"
    GUEST = "guest"
    """Nothing of the image is on this host: a virtual machine's guest pulls it."""

    def is_tighter(self, other: Isolation) -> bool:
        """Shares less than `other`."""
        return _ORDER.index(self) > _ORDER.index(other)


_ORDER: Final = tuple(Isolation)


@dataclass(frozen=True, slots=True)
class Domain:
    """What shares: its name, and whether it ends with the one mount it serves."""

    name: str
    isolation: Isolation
    owner: str = ""
    """On whose behalf: `owner_name`. A shared domain has one for each call."""
    trust_index: str = "off"
    """Which artifact beside an image is believed, for this call: `parse_trust`."""

    @property
    def transient(self) -> bool:
        """Ends with its mount, and its pool with it."""
        return self.isolation is Isolation.POD


def domain_named(name: str) -> Domain:
    """A domain that exists already, and so has its owner on record."""
    return Domain(name, Isolation.POD if name.startswith("pod/") else Isolation.SHARED)


def check_namespace(namespace: str) -> str:
    """`namespace` itself where it is a containerd identifier; raises UsageError."""
    return _check_identifier("namespace", namespace)


def _check_identifier(what: str, text: str) -> str:
    if len(text) > 76 or _NAMESPACE.fullmatch(text) is None:
        raise UsageError(
            f"not a {what}: {text[:100]!r}",
            hint="up to 76 letters and digits, with single dots, dashes or underscores between them",
        )
    return text


def parse_isolation(text: str) -> Isolation:
    """The scope that `text` names; raises UsageError."""
    try:
        return Isolation(text)
    except ValueError:
        names = ", ".join(Isolation)
        raise UsageError(f"not an isolation: {text[:100]!r}", hint=f"one of {names}") from None


TRUST_NONE: Final = "off"
TRUST_REPOSITORY: Final = "same-repository"


def parse_trust(text: str) -> str:
    """Which artifact beside an image is believed before its layers were read through; raises UsageError.

    None ("off"), the newest that lies in the image's own repository ("same-repository"), or the one with a digest.
    """
    if text in {TRUST_NONE, TRUST_REPOSITORY}:
        return text
    try:
        return Digest(text)
    except UsageError:
        raise UsageError(
            f"not a trust in indexes: {text[:200]!r}", hint="off, same-repository, or the digest of an artifact"
        ) from None


# What an administrator says


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Images, namespaces and plugin names by pattern, and what they share. `*` stops at a slash, `**` does not."""

    scope: Isolation
    domain: str = ""
    """Of a shared scope: its name, "shared" where none is given."""
    namespace: str = "**"
    image: str = "**"
    """Registry and repository, without tag or digest."""
    plugin: str = "**"
    trust_index: str = ""
    """`parse_trust`; "" for what the policy says for domains of one owner, and "off" for shared ones."""
    name: str = ""
    """What `nsfs policy explain` calls it."""

    def matches(self, namespace: str, plugin: str, reference: str) -> bool:
        """Whether it is about that image of that namespace, through that plugin name."""
        return (
            _matches(self.namespace, namespace)
            and _matches(self.plugin, plugin)
            and _matches(self.image, repository_of(reference))
        )


def check_rule(rule: Rule) -> Rule:
    """`rule` itself; raises UsageError where it could never do what it says."""
    if rule.domain:
        _check_identifier("domain", rule.domain)
        if rule.scope is not Isolation.SHARED:
            raise UsageError(
                f"only a shared scope has a domain of a name: {rule.domain}", hint=f"{rule.scope} has one of its own"
            )
    if rule.trust_index:
        parse_trust(rule.trust_index)
    if repository_of(rule.image) != rule.image:
        raise UsageError(
            f"an image pattern with a tag or a digest: {rule.image[:200]}",
            hint="rules are about repositories: a tag says nothing of what is in a layer",
        )
    return rule


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, the first that matches decides; and what is so where none does."""

    default: Isolation = Isolation.ISOLATED
    rules: tuple[Rule, ...] = ()
    trust_index: str = TRUST_NONE
    """Where a rule does not say, and the domain is one owner's: `parse_trust`."""


def repository_of(reference: str) -> str:
    """A complete reference without its tag and digest."""
    name = reference.partition("@")[0]
    head, colon, tag = name.rpartition(":")
    return head if colon and "/" not in tag else name


def _matches(pattern: str, text: str) -> bool:
    return _compiled(pattern).fullmatch(text) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*+)", pattern)
    glob = (
        "" if not piece else "[^/]*" if piece == "*" else ".*" if piece[0] == "*" else re.escape(piece)
        for piece in pieces
    )
    return re.compile("".join(glob), re.DOTALL)


# What follows for a mount


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeRequest:
    """What a mount says of itself."""

    namespace: str
    references: tuple[str, ...]
    """The image, complete; behind it those under whose names layers that it stands on were pulled. None: unknown."""
    plugin: str = ""
    """containerd's name for the snapshotter; empty for a mount by hand."""
    wish: str | None = None
    """--isolation, on root's command line."""
    label: str | None = None
    """The value of ISOLATION_LABEL."""
    mount_id: str = ""
    """Names a pod's domain."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a mount gets, and why."""

    scope: Isolation
    domain: Domain | None
    """None where nothing of the image may be on this host."""
    rule: str
    """What decided."""
    reasons: tuple[str, ...]
    """Everything that had a say, in order, one sentence each."""

    def on_host(self) -> Domain:
        """The domain; raises DeniedError where there is none."""
        if self.domain is None:
            raise DeniedError(
                f"nothing of this image may be on the host: {self.rule}",
                hint="scope guest is for containers whose runtime pulls inside of its virtual machine",
            )
        return self.domain


@dataclass(frozen=True, slots=True)
class _Stand:
    """A scope on its way to a decision: `name` is that of a shared domain."""

    scope: Isolation
    name: str
    rule: str
    reasons: tuple[str, ...]
    trust: str = ""
    """What a rule says of indexes; "" where none does."""

    def take(self, scope: Isolation, rule: str) -> _Stand:
        name = self.name if scope is self.scope else ""
        return _Stand(scope, name, rule, (*self.reasons, f"{rule}: {scope}"), self.trust)


def decide_scope(policy: Policy, request: ScopeRequest) -> Decision:
    """The scope and the domain of a mount.

    First the policy's rules, or, where none matches, the plugin name, or the default; a plugin name that names a scope
    is never loosened by a rule. An image whose layers were pulled as parts of others gets what is right for all of
    them. A wish then chooses; a label tightens. Raises UsageError for malformed names, DeniedError for a label that
    would loosen.
    """
    check_namespace(request.namespace)
    tenant = tenant_of(request.plugin)
    stand = reduce(_both, (_stand(policy, request, reference) for reference in request.references or ("",)))
    if request.wish is not None:
        stand = stand.take(parse_isolation(request.wish), "--isolation")
    if request.label is not None:
        stand = _tighten(stand, request.label)
    domain = _domain(stand, request, tenant, policy.trust_index)
    return Decision(stand.scope, domain, stand.rule, stand.reasons)


def _stand(policy: Policy, request: ScopeRequest, reference: str) -> _Stand:
    """What the administrator says of one image."""
    named = scope_of(request.plugin)
    for number, rule in enumerate(policy.rules, 1):
        if rule.matches(request.namespace, request.plugin, reference):
            said = f"rule {number}{f' ({rule.name})' if rule.name else ''}"
            where = f" in domain {rule.domain}" if rule.domain else ""
            stand = _Stand(rule.scope, rule.domain, said, (f"{said}: {rule.scope}{where}",), rule.trust_index)
            return (
                stand.take(named, f"plugin name {request.plugin}") if named and named.is_tighter(stand.scope) else stand
            )
    return _unruled(policy, request, named)


def _unruled(policy: Policy, request: ScopeRequest, named: Isolation | None) -> _Stand:
    none = ("no rule matches",) if policy.rules else ()
    if named is not None:
        return _Stand(named, "", "", none).take(named, f"plugin name {request.plugin}")
    stand = _Stand(policy.default, "", "", none).take(policy.default, "the configuration's isolation")
    if tenant_of(request.plugin) and Isolation.ISOLATED.is_tighter(stand.scope):
        return stand.take(Isolation.ISOLATED, f"plugin name {request.plugin}")
    return stand


def _both(one: _Stand, other: _Stand) -> _Stand:
    """What is right for two images at once: the tighter scope, and no domain that is only one's."""
    trust = one.trust if one.trust == other.trust else TRUST_NONE
    if one.scope is other.scope:
        reasons = tuple(dict.fromkeys((*one.reasons, *other.reasons)))
        both = _Stand(one.scope, one.name, one.rule, reasons, trust)
        if one.name == other.name:
            return both
        return both.take(Isolation.ISOLATED, "layers of images that do not share one domain")
    tight, loose = (one, other) if one.scope.is_tighter(other.scope) else (other, one)
    reasons = tuple(dict.fromkeys((*loose.reasons, *tight.reasons)))
    return _Stand(tight.scope, tight.name, tight.rule, reasons, trust)


def _tighten(stand: _Stand, label: str) -> _Stand:
    scope = parse_isolation(label)
    if stand.scope.is_tighter(scope):
        raise DeniedError(
            f"a label cannot loosen what is decided: {scope} instead of {stand.scope}, by {stand.rule}",
            hint=f"leave {ISOLATION_LABEL} away, or have the administrator change the policy",
        )
    return stand.take(scope, f"label {ISOLATION_LABEL}") if scope.is_tighter(stand.scope) else stand


def _domain(stand: _Stand, request: ScopeRequest, tenant: str, trust: str) -> Domain | None:
    """`trust` is in which artifact beside an image, where no rule says, and the domain is one owner's."""
    owner = owner_name(request.namespace, tenant)
    match stand.scope:
        case Isolation.SHARED:
            return Domain(stand.name or "shared", stand.scope, owner, stand.trust or TRUST_NONE)
        case Isolation.ISOLATED:
            return Domain(own_domain(owner), stand.scope, owner, stand.trust or trust)
        case Isolation.POD:
            return Domain(f"pod/{request.mount_id}", stand.scope, owner, stand.trust or trust)
        case Isolation.GUEST:
            return None


def scope_of(plugin: str) -> Isolation | None:
    """The scope that a plugin name says, if it says one."""
    says = plugin.removeprefix(f"{PLUGIN}-")
    return Isolation(says) if says != plugin and says in _ORDER else None


def tenant_of(plugin: str) -> str:
    """The tenant that a plugin name says, or ""; raises UsageError for one that cannot be."""
    says = plugin.removeprefix(f"{PLUGIN}-")
    return "" if says == plugin or says in _ORDER else _check_identifier("tenant", says)


def owner_name(namespace: str, tenant: str = "") -> str:
    """Who owns mounts, credentials and grants: `namespace`, or `namespace/tenant` where plugin names tell apart."""
    return f"{namespace}/{tenant}" if tenant else namespace


def check_owner(text: str) -> str:
    """`text` itself where it is an owner's name; raises UsageError."""
    namespace, slash, tenant = text.partition("/")
    check_namespace(namespace)
    if slash:
        _check_identifier("tenant", tenant)
    return text


def namespace_of(owner: str) -> str:
    """The namespace that an owner is, or is a tenant of."""
    return owner.partition("/")[0]


def own_domain(owner: str) -> str:
    """The domain that is `owner`'s alone."""
    return f"ns/{owner}"


def owner_of(domain: Domain) -> str:
    """Whose alone `domain` is; "" where several may share it."""
    if domain.name.startswith("ns/"):
        return domain.name.removeprefix("ns/")
    return domain.owner if domain.name.startswith("pod/") else ""


def own_domains(namespace: str, domains: Iterable[str]) -> list[str]:
    """Those of `domains` that are `namespace`'s alone, its tenants' included."""
    own = f"ns/{check_namespace(namespace)}"
    return [domain for domain in domains if domain == own or domain.startswith(f"{own}/")]


def resolve_private_domain(wish: str | None, trust: str = TRUST_NONE) -> Domain:
    """The one domain of a daemon that belongs to a user who is not root; raises DeniedError for any other scope."""
    if wish is not None and parse_isolation(wish) is not Isolation.SHARED:
        raise DeniedError(
            f"isolation needs root: {wish}",
            hint="all mounts of one user run under that user's uid and share one pool; leave --isolation away",
        )
    return Domain("shared", Isolation.SHARED, trust_index=trust)


@dataclass(frozen=True, slots=True)
class Patience:
    """What a read does while its bytes cannot be had: wait `seconds` (None: without end), then fail with EIO."""

    seconds: float | None

    @property
    def suffix(self) -> str:
        """What a view's name carries, so that the file handle of a read says how long it may wait."""
        return "" if self.seconds is None else f"~{self.seconds:g}"


def parse_patience(text: str) -> Patience:
    """`wait`, `wait:<seconds>s` or `eio`; raises UsageError."""
    if text == "wait":
        return Patience(None)
    if text == "eio":
        return Patience(0)
    if found := re.fullmatch(r"wait:(\d{1,6})s?", text):
        return Patience(int(found[1]))
    raise UsageError(f"not an on-error choice: {text[:100]!r}", hint="wait, wait:60s or eio")


_VIEW = re.compile(r"([0-9a-f]{32})(?:_([A-Za-z0-9._-]+))?(?:~([0-9]{1,6}))?(?:~r([0-9a-f]{8}))?")


class ViewName(NamedTuple):
    """What a view's name says."""

    map_id: str
    patience: Patience
    reader: str
    """The owner as whom it asks for what is absent; "" where nobody in particular does."""
    recording: str = ""
    """Which recording notes what it reads: eight hexadecimal digits; "" where none does."""


def view_name(map_id: str, suffix: str, reader: str = "", recording: str = "") -> str:
    """The name under which a map's disk is opened: by mounts of one patience (`Patience.suffix`), and of one owner.

    One that is recorded has a name of its own, of which no kernel has cached anything. A namespace has no two
    underscores in a row, so these stand for the slash before its tenant.
    """
    asker = f"_{reader}".replace("/", "__") if reader else ""
    return f"{map_id}{asker}{suffix}{f'~r{recording}' if recording else ''}"


def parse_view_name(name: str) -> ViewName:
    """What `view_name` was made of; raises UsageError for anything that it does not give."""
    found = _VIEW.fullmatch(name)
    if found is None:
        raise UsageError(f"not a view: {name[:100]!r}")
    map_id, reader, seconds, recording = found.groups(default="")
    owner = check_owner(reader.replace("__", "/")) if reader else ""
    return ViewName(map_id, Patience(int(seconds) if seconds else None), owner, recording)
