"""Documents as registries answer with them: checked against a digest before anybody reads them.

Owns which digest that is: the one that was asked for, else what the registry says, else the document's own. Pure.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nsfs.errors import CorruptError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.oci import Document

if TYPE_CHECKING:
    from nsfs.remote.client import Answer


def check_document(answer: Answer, data: bytes, digest: Digest | None) -> Document:
    """A document as its answer served it; verified by `digest`, or by what the registry says it is."""
    headers = answer.response.headers
    if headers.get("content-encoding", "identity") != "identity":
        raise CorruptError(f"the registry answers in an encoding that nobody asked for: {answer.host}")
    claimed = headers.get("docker-content-digest")
    try:
        expected = digest or (Digest(claimed) if claimed else Digest.of(data))
    except UsageError as error:
        raise CorruptError(f"the registry sends a malformed digest: {answer.host}") from error
    check_digest(data, expected)
    return Document(data, headers.get("content-type", "").partition(";")[0].strip().lower(), expected)


def check_digest(data: bytes, digest: Digest) -> None:
    """Raise CorruptError unless `digest` is that of `data`."""
    if not matches(data, digest):
        raise CorruptError(f"content does not match its digest: {digest}")


def matches(data: bytes, digest: Digest) -> bool:
    """Whether `digest` is that of `data`."""
    return hashlib.new(digest.algorithm, data).hexdigest() == digest.hex
