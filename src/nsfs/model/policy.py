"""Who shares with whom: from a namespace and a wish to the domain that serves it.

The only place where a domain's name is made. A domain is one pool, one worker and one set of credentials; below this
decision nothing asks who the tenant is.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from nsfs.errors import DeniedError, UsageError

_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
"""containerd's identifiers (pkg/identifiers, containerd 1.6 to 2.x), at most 76 characters."""


class Isolation(enum.StrEnum):
    """How much a mount shares, from most to least."""

    SHARED = "shared"
    ISOLATED = "isolated"
    POD = "pod"


@dataclass(frozen=True, slots=True)
class Domain:
    """What shares: its name, and whether it ends with the one mount it serves."""

    name: str
    isolation: Isolation

    @property
    def transient(self) -> bool:
        """Ends with its mount, and its pool with it."""
        return self.isolation is Isolation.POD


def check_namespace(namespace: str) -> str:
    """`namespace` itself where it is a containerd identifier; raises UsageError."""
    if len(namespace) > 76 or _NAMESPACE.fullmatch(namespace) is None:
        raise UsageError(
            f"not a namespace: {namespace[:100]!r}",
            hint="up to 76 letters and digits, with single dots, dashes or underscores between them",
        )
    return namespace


def parse_isolation(text: str) -> Isolation:
    """The scope that `text` names; raises UsageError."""
    try:
        return Isolation(text)
    except ValueError:
        names = ", ".join(Isolation)
        raise UsageError(f"not an isolation: {text[:100]!r}", hint=f"one of {names}") from None


def resolve_domain(namespace: str, wish: str | None, default: Isolation, mount_id: str) -> Domain:
    """The domain for a mount that `namespace` asks for; without a `wish` the default decides."""
    check_namespace(namespace)
    isolation = default if wish is None else parse_isolation(wish)
    match isolation:
        case Isolation.SHARED:
            return Domain("shared", isolation)
        case Isolation.ISOLATED:
            return Domain(f"ns/{namespace}", isolation)
        case Isolation.POD:
            return Domain(f"pod/{mount_id}", isolation)


def resolve_private_domain(wish: str | None) -> Domain:
    """The one domain of a daemon that belongs to a user who is not root; raises DeniedError for any other scope."""
    if wish is not None and parse_isolation(wish) is not Isolation.SHARED:
        raise DeniedError(
            f"isolation needs root: {wish}",
            hint="all mounts of one user run under that user's uid and share one pool; leave --isolation away",
        )
    return Domain("shared", Isolation.SHARED)


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


def view_name(map_id: str, patience: Patience) -> str:
    """The name under which a map's disk is opened by mounts of that patience."""
    return map_id + patience.suffix


def parse_view_name(name: str) -> tuple[str, Patience]:
    """The map ID and patience of `view_name`; raises UsageError for anything that it does not give."""
    map_id, mark, seconds = name.partition("~")
    if re.fullmatch(r"[0-9a-f]{32}", map_id) is None or (mark and re.fullmatch(r"\d{1,6}", seconds) is None):
        raise UsageError(f"not a view: {name[:100]!r}")
    return map_id, Patience(int(seconds) if mark else None)
