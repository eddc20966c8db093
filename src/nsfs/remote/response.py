"""What a registry's answer means: pure decisions about status codes and headers.

Owns: which answer to a range request may be trusted, what an error status is called here, where a redirect may lead,
how long to wait before asking again. An answer counts only if status, Content-Range and length agree with each other
and with what was asked (RFC 9110, sections 14 and 15); a 200 to a range request is the whole blob or nothing. URLs
never appear in messages beyond their host, since signed ones are secrets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import msgspec

from nsfs.errors import CorruptError, DeniedError, NotFoundError, NsfsError, UnreachableError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

REDIRECTS = frozenset({301, 302, 303, 307, 308})
STALE = frozenset({400, 401, 403, 404, 410})
"""What stores answer to a signed URL that expired (S3 403, Google 400, others 401, 404 and 410)."""
LONGEST_WAIT = 86_400.0

_DENIED = "nsfs login -n NAMESPACE REGISTRY, or check the name: it may not exist"
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Wanted:
    """`length` bytes at `offset` of a blob of `size` bytes; `length` is at least 1."""

    offset: int
    length: int
    size: int

    @property
    def whole(self) -> bool:
        """All of the blob, which is asked for without a Range header."""
        return self.length == self.size

    @property
    def header(self) -> str:
        """The value of Range."""
        return f"bytes={self.offset}-{self.offset + self.length - 1}"


def plan_skip(status: int, headers: Mapping[str, str], wanted: Wanted) -> int:
    """How many bytes of a successful answer's body come before the wanted ones; raises CorruptError.

    0 for the range itself; `wanted.offset` where the server ignored the range and sends everything.
    """
    length = _content_length(headers)
    if status == 206:
        _check_content_range(headers.get("content-range", ""), wanted)
        expected = wanted.length
    elif status == 200:
        expected = wanted.size
    else:
        raise CorruptError(f"the registry answers a download with status {status}")
    if length is not None and length != expected:
        raise CorruptError(f"the registry sends {length} bytes where {expected} were asked for")
    return wanted.offset if status == 200 else 0


def plan_redirect(url: str, location: str, *, plain: bool) -> str:
    """Where an answer from `url` leads; plain HTTP only if the registry itself is `plain`."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        valid = bool(location) and parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CorruptError(f"the server redirects to something that is no URL: {urlsplit(url).netloc}")
    if parts.scheme == "http" and not plain:
        raise DeniedError(f"a redirect to plain HTTP is refused: {parts.hostname}")
    return target


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: to whom a header is sent."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)


def parse_retry_after(text: str | None, now: float) -> float | None:
    """Seconds to wait, from either form of Retry-After (RFC 9110, 10.2.3); `now` is Unix time. None if unreadable."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), LONGEST_WAIT)
    try:
        return min(max(0.0, parsedate_to_datetime(text).timestamp() - now), LONGEST_WAIT)
    except (ValueError, OverflowError, TypeError):
        return None


def refusal(status: int, headers: Mapping[str, str], what: str, body: bytes, now: float) -> NsfsError:
    """The error for a status of 400 and more; `what` names server and object, `body` is the answer's beginning."""
    reason = parse_reason(body)
    said = f"{what}: {reason}" if reason else what
    if status in {401, 403, 451}:
        return DeniedError(f"the registry denies access: {said}", hint=_DENIED)
    if status in {404, 410}:
        return NotFoundError(f"the registry has no such thing: {said}")
    if status in {408, 425, 429} or status >= 500:
        wait = parse_retry_after(headers.get("retry-after"), now)
        return UnreachableError(f"the registry cannot answer now: status {status}: {said}", retry_after=wait)
    if status == 416:
        return CorruptError(f"the blob is shorter than its descriptor says: {said}")
    return UnsupportedError(f"the registry does not take the request: status {status}: {said}")


def parse_reason(body: bytes) -> str:
    """The first error of a registry's JSON (distribution specification, "Error Codes"), printable and short."""
    try:
        errors = msgspec.json.decode(body, type=dict).get("errors") or [{}]
        first = errors[0]
        text = " ".join(str(first[key]) for key in ("code", "message") if first.get(key))
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError, LookupError, AttributeError):
        return ""
    return "".join(character if character.isprintable() else " " for character in text[:200])


def _content_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise CorruptError("the registry sends a malformed Content-Length")
    return int(text)


def _check_content_range(text: str, wanted: Wanted) -> None:
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        raise CorruptError("the registry sends a part without saying which")
    first, last = int(match[1]), int(match[2])
    if (first, last) != (wanted.offset, wanted.offset + wanted.length - 1):
        raise CorruptError(f"the registry sends bytes {first}-{last} where {wanted.header} was asked for")
    if match[3] != "*" and int(match[3]) != wanted.size:
        raise CorruptError(f"the registry's blob has {match[3]} bytes, its descriptor says {wanted.size}")
