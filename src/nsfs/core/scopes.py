"""Scopes: what the administrator's policy decides for each mount.

Owns the daemon's policy, and completes references before they are looked up in it. Decides nothing by itself: that is
`model.policy`'s. What was decided for a mount, or for a snapshot that is mounted, no later policy moves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nsfs.model.policy import Decision, decide_scope, resolve_private_domain

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsfs.model.policy import Domain, Policy, ScopeRequest


class Scopes:
    """The service; any number of calls at a time."""

    def __init__(self, policy: Policy, complete: Callable[[str], str], *, root: bool = True) -> None:
        self.policy = policy
        self.complete = complete
        """Spells out what a reference leaves to defaults; raises UsageError for what is none."""
        self._root = root

    def decide(self, request: ScopeRequest) -> Decision:
        """The decision; references may be as users write them. Raises UsageError, DeniedError."""
        references = tuple(map(self.complete, request.references))
        if not self._root:
            rule = "a user's own daemon has one domain"
            domain = resolve_private_domain(request.wish, self.policy.trust_index)
            return Decision(domain.isolation, domain, rule, (rule,))
        return decide_scope(self.policy, replace(request, references=references))

    def is_guest(self, request: ScopeRequest) -> bool:
        """Whether nothing of the image may be on this host; raises as `decide` does."""
        return bool(request.namespace) and self.decide(request).domain is None

    def domain(self, request: ScopeRequest) -> Domain:
        """The domain that is decided; raises DeniedError also where nothing may be on this host."""
        return self.decide(request).on_host()
