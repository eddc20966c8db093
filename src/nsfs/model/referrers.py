"""What is attached to an image: lists of referrers as registries give them, and as clients keep them by a tag. Pure.

Owns the parsing of such a list and the tag's name (OCI distribution specification 1.1, "Listing Referrers" and
"Referrers Tag Schema"), and how the list of a registry without the API is changed: one entry is put in or taken out,
everything else of it, known or not, stays as it was. Between reading and writing it somebody else may change it, too;
registries have no way to notice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from nsfs.errors import CorruptError
from nsfs.model import oci
from nsfs.model.digest import Digest  # noqa: TC001  msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

MAX_REFERRERS: Final = 10_000
_MAX_HEX: Final = 64


class Referrer(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A manifest whose subject is the image's."""

    media_type: str
    digest: Digest
    size: oci.Size
    artifact_type: str = ""
    annotations: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """Bytes to be sent: `size` of them, as often as `pieces` is called."""

    size: int
    pieces: Callable[[], AsyncGenerator[bytes, None]]


def upload_of(data: bytes) -> Upload:
    """`data`, to be sent."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield data

    return Upload(len(data), pieces)


class _List(Struct, kw_only=True):
    manifests: list[Referrer] = []


def tag_of(subject: Digest) -> str:
    """The tag that stands for the list of what is attached to `subject`."""
    return f"{subject.algorithm}-{subject.hex[:_MAX_HEX]}"


def parse_referrers(data: bytes) -> list[Referrer]:
    """The entries of a list, in its order; raises CorruptError."""
    found = oci.decode(data, _List, "list of referrers").manifests
    if len(found) > MAX_REFERRERS:
        raise CorruptError(f"a list of referrers is too long: {len(found)}")
    return found


def render_referrers(found: Sequence[Referrer]) -> bytes:
    """What `parse_referrers` gives the same of."""
    return msgspec.json.encode({"manifests": [msgspec.to_builtins(each, enc_hook=str) for each in found]})


def plan_added(data: bytes | None, referrer: Referrer) -> bytes:
    """The list with `referrer` behind all else; None for a list that there is not yet."""
    document = _raw(data)
    entry = msgspec.to_builtins(referrer, enc_hook=str)
    document["manifests"] = [*_others(document, referrer.digest), entry]
    return msgspec.json.encode(document)


def plan_removed(data: bytes, digest: Digest) -> bytes:
    """The list without the entry of that digest."""
    document = _raw(data)
    document["manifests"] = _others(document, digest)
    return msgspec.json.encode(document)


def _raw(data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": []}
    parse_referrers(data)
    return oci.decode(data, dict[str, Any], "list of referrers")


def _others(document: dict[str, Any], digest: Digest) -> list[Any]:
    return [each for each in document.get("manifests", []) if each.get("digest") != digest]
