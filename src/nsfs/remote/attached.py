"""What is attached to the images of a repository: listed, put there, taken away.

Owns the referrers API with its fallback, a list that clients keep by a tag (OCI distribution specification 1.1), and
uploading: what the registry has is not sent, a blob goes by POST and PUT in one piece, whatever Location says is obeyed
within the rules for redirects. Only what may be written according to hosts.toml is asked to take anything. Bodies are
sent anew at each attempt. A list by tag is read, changed and written: who does so at the same moment may be lost.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import trio

from nsfs.errors import CorruptError, DeniedError, NotFoundError, NsfsError, UnsupportedError
from nsfs.model import oci
from nsfs.model.referrers import parse_referrers, plan_added, plan_removed, tag_of, upload_of
from nsfs.remote.client import Get, first_of, retrying
from nsfs.remote.documents import check_document
from nsfs.remote.hosts import PULL, PUSH
from nsfs.remote.response import plan_redirect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from nsfs.model.digest import Digest
    from nsfs.model.referrers import Referrer, Upload
    from nsfs.remote.client import Answer, Meter, Patience, Server

T = TypeVar("T")
_PAGES = 16
_INDEX = ("Accept", oci.OCI_INDEX)
_OCTETS = ("Content-Type", "application/octet-stream")
_NEXT = re.compile(r'\s*<([^<>]{1,4096})>\s*;(?:[^,]*;)?\s*rel="?next"?')


class Attached:
    """The artifacts of one repository."""

    def __init__(
        self, servers: Callable[[str], list[Server]], repository: str, patience: Patience, meter: Meter
    ) -> None:
        self._servers = servers
        self._repository = repository
        self._patience = patience
        self._meter = meter
        self._has_api: bool | None = None
        """Whether the registry lists referrers by itself; None while nobody has asked."""

    async def referrers(self, subject: Digest, artifact_type: str = "") -> list[Referrer]:
        """What is attached to `subject`, of that type or of any; raises NsfsError, but nothing where there is none.

        A registry that nobody has asked yet is asked in both ways at once.
        """
        if self._has_api is not None:
            found = await self._try_api(subject, artifact_type) if self._has_api else None
            return _of_type(await self._listed(subject) if found is None else found, artifact_type)
        async with _begun(lambda: self._listed(subject)) as listed:
            found = await self._try_api(subject, artifact_type)
            return _of_type(await listed() if found is None else found, artifact_type)

    async def _try_api(self, subject: Digest, artifact_type: str) -> list[Referrer] | None:
        """What the registry lists by itself; None where it has no API."""
        try:
            found = await retrying(self._patience, lambda: self._ask_api(subject, artifact_type))
        except (NotFoundError, UnsupportedError):
            self._has_api = False
            return None
        self._has_api = True
        return found

    async def _listed(self, subject: Digest) -> list[Referrer]:
        """What the list by tag has."""
        data = await self._list(subject)
        return parse_referrers(data) if data else []

    async def _ask_api(self, subject: Digest, artifact_type: str) -> list[Referrer]:
        path = f"/{self._repository}/referrers/{subject}"
        if artifact_type:
            path += f"?artifactType={quote(artifact_type, safe='')}"

        async def ask(server: Server) -> list[Referrer]:
            found: list[Referrer] = []
            location = ""
            for _ in range(_PAGES):
                get = Get(path, self._repository, self._about(subject), headers=(_INDEX,), location=location)
                async with server.open(get, self._meter) as answer:
                    found += _parse_page(await answer.read(oci.MAX_MANIFEST, get.what))
                    location = _next_page(answer, plain=server.endpoint.plain)
                if not location:
                    break
            return found

        return await first_of(self._servers(PULL), ask)

    async def _list(self, subject: Digest) -> bytes | None:
        """The list by tag, as it stands; None where there is none."""
        tag = tag_of(subject)
        get = Get(f"/{self._repository}/manifests/{tag}", self._repository, self._about(tag), headers=(_INDEX,))

        async def ask(server: Server) -> bytes:
            async with server.open(get, self._meter) as answer:
                return check_document(answer, await answer.read(oci.MAX_MANIFEST, get.what), None).data

        try:
            return await retrying(self._patience, lambda: first_of(self._servers(PULL), ask))
        except NotFoundError:
            return None

    async def has_blob(self, digest: Digest) -> bool:
        """Whether the repository has it already."""
        try:
            await self._write("HEAD", f"blobs/{digest}")
        except NotFoundError:
            return False
        return True

    async def put_blob(self, digest: Digest, upload: Upload) -> None:
        """Upload a blob, unless the repository has it; raises NsfsError."""
        if await self.has_blob(digest):
            return

        async def put(server: Server) -> None:
            begin = self._get("POST", "blobs/uploads/", upload=upload_of(b""))
            async with server.open(begin, self._meter) as answer:
                location = server.locate(answer, f"digest={quote(str(digest), safe='')}")
            send = self._get("PUT", f"blobs/{digest}", headers=(_OCTETS,), upload=upload, location=location)
            async with server.open(send, self._meter):
                return

        await retrying(self._patience, lambda: put(self._writable()))

    async def attach(self, data: bytes, media_type: str, subject: Digest, referrer: Referrer) -> None:
        """Put a manifest there whose blobs are; and into the list by tag, where the registry keeps none of its own."""
        headers = await self._put_manifest(str(referrer.digest), data, media_type)
        if headers.get("oci-subject") or await self._lists(subject):
            return
        await self._put_list(subject, plan_added(await self._list(subject), referrer))

    async def detach(self, subject: Digest, digest: Digest) -> None:
        """Take an artifact's manifest, and its entry, away; raises UnsupportedError where the registry never deletes.

        Where a list is kept by tag nobody finds it any more even then.
        """
        listed = None if await self._lists(subject) else await self._list(subject)
        if listed is not None:
            await self._put_list(subject, plan_removed(listed, digest))
        try:
            await self._write("DELETE", f"manifests/{digest}")
        except NotFoundError:
            return
        except (UnsupportedError, DeniedError) as error:
            left = "it is in no list any more, but still there" if listed is not None else "it is still there"
            raise UnsupportedError(
                f"the registry does not delete: {left}: {error.message}",
                hint="registries have deleting as an option, and rights of its own for it",
            ) from None

    async def _lists(self, subject: Digest) -> bool:
        """Whether the registry lists referrers by itself."""
        if self._has_api is None:
            await self.referrers(subject)
        return bool(self._has_api)

    async def _put_list(self, subject: Digest, data: bytes) -> None:
        await self._put_manifest(tag_of(subject), data, oci.OCI_INDEX)

    async def _put_manifest(self, name: str, data: bytes, media_type: str) -> Mapping[str, str]:
        headers = (("Content-Type", media_type),)
        return await self._write("PUT", f"manifests/{name}", headers=headers, upload=upload_of(data))

    async def _write(
        self, method: str, path: str, *, headers: tuple[tuple[str, str], ...] = (), upload: Upload | None = None
    ) -> Mapping[str, str]:
        get = self._get(method, path, headers=headers, upload=upload)

        async def ask() -> Mapping[str, str]:
            async with self._writable().open(get, self._meter) as answer:
                return answer.response.headers

        return await retrying(self._patience, ask)

    def _writable(self) -> Server:
        """The one server that takes what is written."""
        able = self._servers(PUSH)
        return next((server for server in able if not server.endpoint.namespace), able[0])

    def _get(
        self,
        method: str,
        path: str,
        *,
        headers: tuple[tuple[str, str], ...] = (),
        upload: Upload | None = None,
        location: str = "",
    ) -> Get:
        about = self._about(path.partition("/")[2])
        return Get(
            f"/{self._repository}/{path}",
            self._repository,
            about,
            headers=headers,
            method=method,
            upload=upload,
            location=location,
        )

    def _about(self, what: str) -> str:
        return f"{self._repository}: {what}"


@asynccontextmanager
async def _begun(work: Callable[[], Awaitable[T]]) -> AsyncIterator[Callable[[], Awaitable[T]]]:
    """Begin `work` before it is known whether anybody wants its outcome; what this gives waits for that."""
    outcomes: list[T | NsfsError] = []
    ended = trio.Event()

    async def run() -> None:
        outcomes.append(await _outcome(work))
        ended.set()

    async def wait() -> T:
        await ended.wait()
        if isinstance(outcomes[0], NsfsError):
            raise outcomes[0]
        return outcomes[0]

    failure: NsfsError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        try:
            yield wait
        except NsfsError as error:
            failure = error  # raised outside of the nursery, which would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _outcome(work: Callable[[], Awaitable[T]]) -> T | NsfsError:
    try:
        return await work()
    except NsfsError as error:
        return error


def _parse_page(data: bytes) -> list[Referrer]:
    """What the API gave; a page for people, say to log in, comes where there is no API."""
    try:
        return parse_referrers(data)
    except CorruptError as error:
        raise UnsupportedError(error.message) from None


def _of_type(found: list[Referrer], artifact_type: str) -> list[Referrer]:
    """Registries may filter, and need not say that they did not."""
    return [each for each in found if not artifact_type or each.artifact_type == artifact_type]


def _next_page(answer: Answer, *, plain: bool) -> str:
    """Where the list goes on (RFC 8288); "" at its end."""
    response = answer.response
    match = _NEXT.match(response.headers.get("link", ""))
    return plan_redirect(str(response.request.url), match[1], plain=plain) if match else ""
