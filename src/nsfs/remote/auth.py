"""How a registry is told who asks.

Owns: parsing of WWW-Authenticate (RFC 9110, section 11), the token protocol of the distribution project (GET with a
scope; POST for identity tokens), and the tokens themselves, by host, repository and what they allow, until shortly
before they expire. Refuses to send a secret to anybody but the host it was looked up for and, over TLS, the token
server that it names; to ask for more than the request needs; to follow a token server elsewhere. One task at a time
asks for the same token, the others wait for its answer. Header values are returned, never stored anywhere else or
logged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec
import trio

from nsfs.errors import DeniedError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from nsfs.remote.credentials import Credential, Credentials

_DEFAULT_LIFE = 60
"""Seconds, where the answer does not say (distribution, "Token Authentication Specification")."""
_LONGEST_LIFE = 3600
_MARGIN = 0.8
"""The part of its life for which a token is used."""
MAX_TOKEN_ANSWER = 1 << 20


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate that a server offers. `scheme` and parameter names are lower case."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to ask a token server. `form` is sent by POST; None means GET with `query`."""

    url: str
    query: tuple[tuple[str, str], ...] = ()
    form: tuple[tuple[str, str], ...] | None = field(default=None, repr=False)
    authorization: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Token:
    """What goes behind `Authorization: Bearer`, and for how many seconds it may be used."""

    value: str = field(repr=False)
    life: float


_PARAMETER = re.compile(r'\s*([\w!#$%&\'*+.^`|~-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]*)\s*')
_SCHEME = re.compile(r"\s*([\w!#$%&'*+.^`|~-]+)(?:\s+|\s*$|(?=,))(?!=)")
_SCOPE = re.compile(r"repository:[a-z0-9._/-]{1,512}:(pull|push|pull,push|push,pull|delete)")
PULL = "pull"


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers, in order; what cannot be read is left out, never an error."""
    return [challenge for header in headers for challenge in _parse_header(header[:8192])]


def plan_token_request(
    challenge: Challenge, repository: str, credential: Credential | None, *, plain: bool, actions: str = PULL
) -> TokenRequest:
    """How to get a token for `actions` in `repository`, or, where that is "", one that only says who asks.

    `plain` if the registry itself is asked without TLS.
    """
    realm = challenge.parameters.get("realm", "")
    _check_realm(realm, plain=plain)
    service = challenge.parameters.get("service", "")
    scope = challenge.parameters.get("scope", "")
    found = _SCOPE.fullmatch(scope)
    if found is None or set(found[1].split(",")) != set(actions.split(",")):
        scope = f"repository:{repository}:{actions}" if repository else ""
    named = (*((("service", service),) if service else ()), *((("scope", scope),) if scope else ()))
    if credential and credential.identity_token:
        grant = (("grant_type", "refresh_token"), ("refresh_token", credential.identity_token), ("client_id", "nsfs"))
        return TokenRequest(realm, form=(*grant, *named))
    account = (("account", credential.username),) if credential else ()
    return TokenRequest(realm, query=(*named, *account), authorization=credential.basic if credential else None)


def parse_token(data: bytes) -> Token:
    """A token server's answer; raises DeniedError if it holds no token that can stand in a header."""
    try:
        answer = msgspec.json.decode(data, type=dict)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        answer = {}
    value = answer.get("token") or answer.get("access_token")
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise DeniedError("the token server's answer holds no token")
    return Token(value, _life(answer.get("expires_in")) * _MARGIN)


@dataclass(slots=True)
class _Entry:
    lock: trio.Lock = field(default_factory=trio.Lock)
    header: str | None = field(default=None, repr=False)
    expires: float = 0.0
    challenge: Challenge | None = None


class Authorizer:
    """Authorization headers for one server, by repository and what is to be done there.

    `host` is what credentials are looked up for, `ask` sends a token request and returns the body of its 200.
    """

    def __init__(
        self, host: str, credentials: Credentials, ask: Callable[[TokenRequest], Awaitable[bytes]], *, plain: bool
    ) -> None:
        self._host = host
        self._credentials = credentials
        self._ask = ask
        self._plain = plain
        self._entries: dict[tuple[str, str], _Entry] = {}

    async def get(self, repository: str, actions: str = PULL) -> str | None:
        """The header for a request now; None to ask without one. Renews a token that expired."""
        entry = self._entries.get((repository, actions))
        if entry is None or entry.challenge is None:
            return None
        if trio.current_time() >= entry.expires:
            return await self._obtain((repository, actions), entry.challenge, entry.header, again=False)
        return entry.header

    async def answer(
        self, repository: str, challenges: list[Challenge], refused: str | None, actions: str = PULL
    ) -> str | None:
        """The header to try after a 401 or 403; None if there is nothing better than `refused`, the one just used.

        A refusal without a challenge is answered as the last challenge was: that is how some servers say that a token
        expired.
        """
        entry = self._entries.setdefault((repository, actions), _Entry())
        challenge = _choose(challenges) or entry.challenge
        if challenge is None:
            return None
        return await self._obtain((repository, actions), challenge, refused, again=refused is not None)

    async def _obtain(
        self, purpose: tuple[str, str], challenge: Challenge, refused: str | None, *, again: bool
    ) -> str | None:
        entry = self._entries[purpose]
        async with entry.lock:
            if entry.header is not None and entry.header != refused and trio.current_time() < entry.expires:
                return entry.header
            header, life = await self._negotiate(*purpose, challenge, again=again)
            if header is None or (header == refused and challenge.scheme == "basic"):
                return None
            entry.challenge, entry.header, entry.expires = challenge, header, trio.current_time() + life
            return header

    async def _negotiate(
        self, repository: str, actions: str, challenge: Challenge, *, again: bool
    ) -> tuple[str | None, float]:
        credential = await self._credentials.lookup(self._host, repository, again=again)
        if challenge.scheme == "basic":
            usable = credential is not None and not credential.identity_token
            life = credential.life if credential and credential.life is not None else _LONGEST_LIFE
            return (credential.basic if credential and usable else None), min(life, _LONGEST_LIFE)
        request = plan_token_request(challenge, repository, credential, plain=self._plain, actions=actions)
        token = parse_token(await self._ask(request))
        return f"Bearer {token.value}", token.life


def _parse_header(header: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    position = 0
    while position < len(header):
        if (match := _PARAMETER.match(header, position)) and challenges:
            parameters = dict(challenges[-1].parameters)
            parameters.setdefault(match[1].lower(), _unquoted(match[2]))
            challenges[-1] = Challenge(challenges[-1].scheme, parameters)
        elif match := _SCHEME.match(header, position):
            challenges.append(Challenge(match[1].lower(), {}))
        position = match.end() if match else header.find(",", position) if "," in header[position:] else len(header)
        position += header[position : position + 1] == ","
    return challenges


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text.startswith('"') else text


def _choose(challenges: list[Challenge]) -> Challenge | None:
    """A token before a password, as docker does."""
    by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
    return by_scheme.get("bearer") or by_scheme.get("basic")


def _check_realm(realm: str, *, plain: bool) -> None:
    try:
        parts = urlsplit(realm)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.username is None
        secure = parts.scheme == "https" or plain
    except ValueError:
        valid = secure = False
    if not valid:
        raise UnreachableError("the registry names no token server that can be asked")
    if not secure:
        raise DeniedError(f"the registry names a token server without TLS: {parts.hostname}")


def _life(expires_in: object) -> float:
    if not isinstance(expires_in, int | float) or isinstance(expires_in, bool) or not 0 < expires_in < float("inf"):
        return _DEFAULT_LIFE
    return min(float(expires_in), _LONGEST_LIFE)
