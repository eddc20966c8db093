"""The policy file: an administrator's ordered rules of who shares what, as TOML.

Owns the file's grammar: a `[[rule]]` for each rule, keys as in `model.policy.Rule`. Refuses unknown keys and rules that
could never do what they say, and names the rule, so that nothing is shared, or kept apart, by a typing error. Values
only.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from nsfs.errors import DeniedError, NotFoundError, UsageError
from nsfs.model.policy import TRUST_NONE, Isolation, Policy, Rule, check_rule, parse_trust
from nsfs.serve.config import tidy

if TYPE_CHECKING:
    from nsfs.serve.config import Config


class _Rule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    scope: Isolation
    domain: str = ""
    namespace: str = "**"
    image: str = "**"
    plugin: str = "**"
    trust_index: str = ""
    name: str = ""


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rule: list[_Rule] = []


def parse_policy(text: str, default: Isolation, source: str = "policy", *, trust_index: str = TRUST_NONE) -> Policy:
    """The rules of the TOML document `text`, over `default`; raises UsageError that names `source` and the rule."""
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is no TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {tidy(str(error))}") from None
    rules = tuple(_check(number, rule, source) for number, rule in enumerate(file.rule, 1))
    return Policy(default, rules, trust_index)


def load_policy(config: Config) -> Policy:
    """What `config` says, its policy file's rules included; raises NotFoundError, DeniedError, UsageError."""
    path, trust = config.policy, parse_trust(config.trust_index)
    if not path:
        return Policy(config.isolation, trust_index=trust)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise NotFoundError(f"no such policy: {path}") from None
    except PermissionError:
        raise DeniedError(f"policy is not readable: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"policy is not readable: {path}: {error}") from None
    return parse_policy(text, config.isolation, path, trust_index=trust)


def _check(number: int, rule: _Rule, source: str) -> Rule:
    try:
        return check_rule(Rule(**msgspec.structs.asdict(rule)))
    except UsageError as error:
        raise UsageError(f"{source}: rule {number}: {error.message}", hint=error.hint) from None
