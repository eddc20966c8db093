"""Which domains are encrypted at rest, and where their keys are.

The only place where that is decided. A key in memory ends with whoever holds it, and what is under it is noise then.
"""

from __future__ import annotations

import enum


class Encrypt(enum.StrEnum):
    """What of a host is encrypted."""

    ISOLATED = "isolated"
    """Domains that one namespace, or one pod, has for itself."""
    ALL = "all"
    OFF = "off"


class KeyPlace(enum.Enum):
    """Where the key of a domain is."""

    NOWHERE = enum.auto()
    """The domain is not encrypted."""
    DISK = enum.auto()
    MEMORY = enum.auto()


def plan_key(domain: str, encrypt: Encrypt) -> KeyPlace:
    """Where the key of a domain is that begins now, by its name (`model.policy`)."""
    kind, slash, _ = domain.partition("/")
    is_own = bool(slash) and kind in {"ns", "pod"}
    if encrypt is Encrypt.OFF or (encrypt is Encrypt.ISOLATED and not is_own):
        return KeyPlace.NOWHERE
    return KeyPlace.MEMORY if is_own and kind == "pod" else KeyPlace.DISK
