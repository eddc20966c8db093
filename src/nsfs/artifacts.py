"""`nsfs index`: composition root of what is put beside an image in its registry, shown and taken away.

Runs in the command's process, with its user's credentials and the registry settings of the daemon's configuration: no
daemon and no worker ever writes to a registry. What is put there comes from the daemon of whoever asks, part by part,
and waits in a directory of its own until all of it is there.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import tempfile
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Final, Protocol, TypeAlias

import trio

from nsfs.core import publish
from nsfs.core.publish import IndexReport
from nsfs.errors import NoSpaceError, UnsupportedError
from nsfs.format.artifact import PACK_TYPE, plan_head
from nsfs.model.digest import Digest
from nsfs.model.oci import Platform
from nsfs.model.report import Data, Part
from nsfs.remote.credentials import DockerConfig, config_path
from nsfs.remote.reference import Reference, parse_reference
from nsfs.remote.registry import RegistrySource
from nsfs.remote.source import open_source
from nsfs.remote.transport import Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nsfs.core.publish import ArtifactReport, StoredPart
    from nsfs.model.report import Item, Progress
    from nsfs.serve.api import ExportReport
    from nsfs.serve.config import Registry as Settings

    Take: TypeAlias = Callable[[Data | Item | Part], None]


_PIECE: Final = 1 << 20


class Talk(Protocol):
    """To whom we say how far it is."""

    def progress(self, report: Progress) -> None:
        """Say it."""


class Parts:
    """Takes what the daemon sends, into files of `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._names = itertools.count()
        self._open: tuple[Part, IO[bytes]] | None = None
        self._hash = hashlib.sha256()
        self.stored: list[StoredPart] = []

    def take(self, event: Data | Item | Part) -> None:
        """The next event; raises NoSpaceError."""
        try:
            self._take(event)
        except OSError as error:
            raise NoSpaceError(f"what is to be pushed cannot be kept: {self._directory}: {error.strerror}") from None

    def _take(self, event: Data | Item | Part) -> None:
        if isinstance(event, Part):
            self.finish()
            self._open = event, open(os.path.join(self._directory, str(next(self._names))), "wb")  # noqa: SIM115
            self._hash = hashlib.sha256()
        elif isinstance(event, Data) and self._open:
            self._open[1].write(event.data)
            self._hash.update(event.data)

    def finish(self) -> None:
        """Nothing more comes of the part that came last."""
        if self._open is None:
            return
        part, file = self._open
        with file:
            size = file.tell()
        digest = Digest(f"sha256:{self._hash.hexdigest()}")
        self.stored.append(publish.StoredPart(part.media_type, part.layer, digest, size, file.name))
        self._open = None

    def lead(self) -> None:
        """Have the pack, if there is one, begin with what a node wants before it."""
        found = [number for number, part in enumerate(self.stored) if part.media_type == PACK_TYPE]
        for number in found:
            head = [self.stored[each] for each in plan_head(part.media_type for part in self.stored)]
            pieces = self.stored.pop(number)
            self.take(Part(media_type=PACK_TYPE))
            for part in (*head, pieces):
                with open(part.path, "rb") as file:
                    while data := file.read(_PIECE):
                        self.take(Data(data))
            self.finish()


def push(
    reference: str, settings: Settings, talk: Talk, export: Callable[[Take], ExportReport]
) -> tuple[str, ArtifactReport]:
    """Put beside an image what `export` gives: its complete name, and what lies there now; blocks; raises NsfsError."""
    repository = _parse(reference)
    with tempfile.TemporaryDirectory(prefix="nsfs-index-") as directory:
        parts = Parts(directory)
        exported = export(parts.take)
        parts.finish()
        parts.lead()

        async def run() -> ArtifactReport:
            async with _opened(repository, settings) as source:
                image = await publish.find_image(source, exported.digest, _platform(None))
                created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                return await publish.publish(source, source.attached, image, parts.stored, created, talk.progress)

        return exported.reference, trio.run(run)


def show(reference: str, platform_name: str | None, settings: Settings) -> IndexReport:
    """What is beside the image; blocks; raises NsfsError."""
    repository = _parse(reference)

    async def run() -> IndexReport:
        async with _opened(repository, settings) as source:
            image = await publish.find_image(source, repository.identifier, _platform(platform_name))
            found = await publish.load(source, source.attached, image.digest)
            return IndexReport(reference=reference, artifacts=found)

    return trio.run(run)


def remove(reference: str, platform_name: str | None, digest: Digest | None, settings: Settings) -> IndexReport:
    """Take it away, or the one with that digest; blocks; raises NsfsError."""
    repository = _parse(reference)

    async def run() -> IndexReport:
        async with _opened(repository, settings) as source:
            image = await publish.find_image(source, repository.identifier, _platform(platform_name))
            gone = await publish.remove(source, source.attached, image.digest, digest)
            return IndexReport(reference=reference, artifacts=gone)

    return trio.run(run)


def _parse(reference: str) -> Reference:
    found = parse_reference(reference)
    if not isinstance(found, Reference):
        raise UnsupportedError(f"nothing is put beside images of a layout: {reference}", hint="push it to a registry")
    return found


@asynccontextmanager
async def _opened(repository: Reference, settings: Settings) -> AsyncIterator[RegistrySource]:
    async with open_source(
        repository,
        credentials=DockerConfig(settings.docker_config or config_path(os.environ)),
        hosts=settings.config_path,
        timeouts=Timeouts(settings.connect_timeout, settings.read_timeout),
    ) as source:
        assert isinstance(source, RegistrySource)
        yield source


def _platform(name: str | None) -> Platform:
    return Platform.parse(name) if name else Platform(platform.machine(), "linux").normal()
