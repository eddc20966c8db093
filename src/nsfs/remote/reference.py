"""Image references as users write them.

Owns two grammars: Docker's (`python`, `ghcr.io/org/app:1.2`, `localhost:5000/x@sha256:…`), with its defaults spelled
out in the result, and `oci:DIR[:TAG]` for an OCI image layout. Pure: no file is looked at and no name resolved. A
value that exists is well formed, so its parts may stand in a URL. Rendering a value and parsing it gives it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nsfs.errors import UsageError
from nsfs.model.digest import Digest

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
MAX_REPOSITORY = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A manifest in a registry's repository. `digest` wins over `tag`; at least one is set."""

    registry: str
    """Lower-case host[:port], as users write it (docker.io)."""
    repository: str
    tag: str | None
    digest: Digest | None

    @property
    def identifier(self) -> str:
        """What to ask the registry for."""
        return self.digest or self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """A manifest in an OCI image layout: the one with that tag or digest, or the only one."""

    directory: str
    tag: str | None = None
    digest: Digest | None = None

    @property
    def identifier(self) -> str:
        """What to look for; "" for the only manifest."""
        return self.digest or self.tag or ""

    def __str__(self) -> str:
        if self.digest:
            return f"oci:{self.directory}@{self.digest}"
        if self.tag or ":" in _last(self.directory):
            return f"oci:{self.directory}:{self.tag or ''}"
        return f"oci:{self.directory}"


def parse_reference(text: str) -> Reference | LayoutReference:
    """Parse what a user typed; raises UsageError with a hint."""
    if text.startswith("oci:"):
        return _parse_layout(text)
    if _IMAGE_ID.fullmatch(text):
        raise UsageError(f"an image ID names nothing in a registry: {text}", hint="write REPOSITORY@sha256:…")
    name, at, digest_text = text.partition("@")
    digest = Digest(digest_text) if at else None
    name, tag = _split_tag(name)
    registry, repository = _split_registry(name)
    _check_repository(repository, text)
    if tag is None and digest is None:
        tag = DEFAULT_TAG
    return Reference(registry, repository, tag, digest)


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon in the last component begins a tag; before that it belongs to the registry's port."""
    if ":" not in _last(name):
        return name, None
    head, _, tag = name.rpartition(":")
    return head, _checked_tag(tag)


def _checked_tag(tag: str) -> str:
    if _TAG.fullmatch(tag) is None:
        raise UsageError(f"not a tag: {tag[:200]!r}", hint="a tag is up to 128 letters, digits, '_', '.' or '-'")
    return tag


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not (set(first) & {".", ":"} or first == "localhost"):
        return DEFAULT_REGISTRY, name if slash else f"library/{name}"
    registry = _checked_registry(first)
    if registry == DEFAULT_REGISTRY and "/" not in rest:
        rest = f"library/{rest}"
    return registry, rest


def _checked_registry(text: str) -> str:
    match = _REGISTRY.fullmatch(text)
    if match is None or len(text) > 255 or int(match["port"] or 0) > 65535:
        raise UsageError(f"not a registry's host name: {text[:300]!r}", hint="a registry is HOST or HOST:PORT")
    lower = text.lower()
    return DEFAULT_REGISTRY if lower == "index.docker.io" else lower


def _check_repository(repository: str, text: str) -> None:
    if len(repository) > MAX_REPOSITORY:
        raise UsageError(f"the repository's name is too long: {len(repository)} characters, at most {MAX_REPOSITORY}")
    if _REPOSITORY.fullmatch(repository):
        return
    if _REPOSITORY.fullmatch(repository.lower()):
        raise UsageError(f"upper case in a repository's name: {text[:300]!r}", hint=f"write {repository.lower()}")
    raise UsageError(
        f"not an image reference: {text[:300]!r}", hint="write [REGISTRY/]REPOSITORY[:TAG][@DIGEST] or oci:DIR[:TAG]"
    )


def _parse_layout(text: str) -> LayoutReference:
    """The last colon behind the last slash separates the tag; `oci:DIR:` names a directory with a colon in its name."""
    rest = text.removeprefix("oci:")
    directory, at, digest_text = rest.rpartition("@")
    if at and digest_text.startswith(("sha256:", "sha512:")):
        return LayoutReference(_checked_directory(directory, text), digest=Digest(digest_text))
    if ":" not in _last(rest):
        return LayoutReference(_checked_directory(rest, text))
    directory, _, tag = rest.rpartition(":")
    return LayoutReference(_checked_directory(directory, text), tag=_checked_tag(tag) if tag else None)


def _checked_directory(directory: str, text: str) -> str:
    if not directory or "\0" in directory:
        raise UsageError(f"no directory in the reference: {text[:300]!r}", hint="write oci:DIR[:TAG]")
    return directory


def _last(path: str) -> str:
    return path.rpartition("/")[2]
