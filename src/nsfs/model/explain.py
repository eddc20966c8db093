"""What a decision of `model.policy` means, in words that an administrator can check. Pure.

Says what is so, not what might be wished: a sentence here is a promise of the threat model, or of its absence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsfs.model.encryption import KeyPlace, plan_key
from nsfs.model.policy import TRUST_NONE, TRUST_REPOSITORY, Isolation

if TYPE_CHECKING:
    from nsfs.model.encryption import Encrypt
    from nsfs.model.policy import Decision, Domain, Policy

_FOLLOWS: dict[Isolation, dict[str, str]] = {
    Isolation.SHARED: {
        "disk": "one pool, with one copy of what any of its namespaces reads",
        "memory": "one page cache: what one namespace read is quick for all",
        "process": "one worker, with a uid of its own and no privileges, and one fuse connection for all of them",
        "seen": "by timing, who may have an image can tell what others of them have read of it",
        "ends": "with nobody: it stays until it is evicted or deleted",
    },
    Isolation.ISOLATED: {
        "disk": "a pool of its own; the same content elsewhere on this host is fetched and kept again",
        "memory": "a page cache of its own",
        "process": "a worker with a uid of its own and no privileges, and a fuse connection of its own",
        "seen": "nobody else can tell what is in it, nor what is read",
        "ends": "with its namespace: nsfs ns rm",
    },
    Isolation.POD: {
        "disk": "a pool of this mount's own; every mount fetches anew",
        "memory": "a page cache of this mount's own",
        "process": "a worker with a uid and no privileges, and a fuse connection, of this mount's own",
        "seen": "nobody else, of the same namespace neither, can tell what is in it, nor what is read",
        "ends": "with its mount, and the pool with it",
    },
    Isolation.GUEST: {
        "disk": "nothing: not a byte of a layer is on this host",
        "memory": "nothing",
        "process": "none",
        "seen": "nsfs knows the image's name and its layers' digests, as containerd does",
        "ends": "with its container",
    },
}


_KEYS: dict[KeyPlace, str] = {
    KeyPlace.DISK: "encrypted on disk, under a key of its own that goes with it",
    KeyPlace.MEMORY: "encrypted on disk, under a key of its own that is in memory alone",
    KeyPlace.NOWHERE: "not encrypted",
}


def follows_of(decision: Decision, encrypt: Encrypt) -> dict[str, str]:
    """What the decision means for the disk, its key, memory, processes, what others see, when it ends, indexes."""
    key = "nothing to encrypt" if decision.domain is None else _KEYS[plan_key(decision.domain.name, encrypt)]
    return {**_FOLLOWS[decision.scope], "key": key, "index": _index_of(decision.domain)}


def _index_of(domain: Domain | None) -> str:
    """Who says how layers are read."""
    if domain is None or domain.trust_index == TRUST_NONE:
        return "layers without a table of contents are read through here before they are shown"
    if domain.trust_index == TRUST_REPOSITORY:
        return "whoever may push to an image's repository says what is in its layers, until they are complete here"
    return f"artifact {domain.trust_index} says what is in its image's layers, until they are complete here"


def sharers_of(policy: Policy, decision: Decision) -> list[str]:
    """Who else gets the domain of a shared decision; of any other nobody does."""
    if decision.domain is None or decision.scope is not Isolation.SHARED:
        return []
    name = decision.domain.name
    said = [
        f"rule {number}: namespace {rule.namespace}, image {rule.image}, plugin name {rule.plugin}"
        for number, rule in enumerate(policy.rules, 1)
        if rule.scope is Isolation.SHARED and (rule.domain or "shared") == name
    ]
    if name == "shared":
        said.append("plugin name nsfs-shared, and --isolation shared, where no rule says otherwise")
        said += ["every mount that says nothing else"] * (policy.default is Isolation.SHARED)
    return said
