"""Completing layers in the background: what is absent of pinned images, and of what is in use where that is configured.

Owns what is to be completed, and when: a pinned image at once, until all of it is there; a layer in use once nobody
waited for a byte for a while, and no longer than it is in use. Refuses to fetch again what was given up while it is in
use (evicted, not to be had, or without room): its next use may.

Concurrency: tasks in the worker's nursery, one layer at a time for each owner: one whose registry drips keeps others
waiting for that layer alone. They fetch at the lowest priority, so that reads pass. Nothing of it is kept: a successor
of the worker is told anew what is pinned and in use.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from nsfs.errors import NoSpaceError, NsfsError
from nsfs.model import oci

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from nsfs.model.digest import Digest
    from nsfs.model.pool import ImageRecord, LayerKey, LayerRecord

log = logging.getLogger(__name__)

_PAUSE_LEAST, _PAUSE_MOST = 1.0, 60.0
"""Seconds until what could not be completed is tried again."""
_QUIET: Final = 5.0
"""Seconds in which nobody waited: then a start is over, or pauses."""


class InUse(NamedTuple):
    """A layer that is mounted, and as whom its readers ask."""

    key: LayerKey
    owner: str


@dataclass(eq=False, slots=True)
class _Turn:
    """One owner's."""

    limiter: trio.CapacityLimiter = field(default_factory=partial(trio.CapacityLimiter, 1))
    current: tuple[InUse, trio.CancelScope] | None = None
    """What is being completed of what that owner uses."""
    is_running: bool = False
    """What that owner uses is looked after."""


class Records(Protocol):
    """The domain's layers."""

    def layers(self) -> list[LayerRecord]:
        """All of them."""


class Contents(Protocol):
    """Layers' contents."""

    async def complete(self, key: LayerKey, owner: str) -> None:
        """Have all of a layer in the pool; raises NsfsError."""

    def quiet_for(self) -> float:
        """Seconds since a reader last waited for absent bytes; 0 while one does."""


class Completing:
    """The service. Layers in use are left alone unless it `follows_use`."""

    def __init__(self, records: Records, contents: Contents, nursery: trio.Nursery, *, follows_use: bool) -> None:
        self._records = records
        self._contents = contents
        self._nursery = nursery
        self._follows_use = follows_use
        self._turns: defaultdict[str, _Turn] = defaultdict(_Turn)
        self._locks: defaultdict[LayerKey, trio.Lock] = defaultdict(trio.Lock)
        self._pins: dict[str, trio.CancelScope] = {}
        self._used: dict[InUse, None] = {}
        self._settled: set[InUse] = set()
        """Of those in use: complete, or not to be had."""

    # Pinned images

    def begin(self, pin: ImageRecord) -> None:
        """Fetch what is absent of a pinned image, for as long as that takes."""
        key = _pin_key(pin)
        if key not in self._pins:
            scope = self._pins[key] = trio.CancelScope()
            self._nursery.start_soon(self._complete_pin, pin, scope)

    def end(self, pin: ImageRecord) -> None:
        """Leave an image as it is: nobody pins it any more."""
        if scope := self._pins.pop(_pin_key(pin), None):
            scope.cancel()

    async def _complete_pin(self, pin: ImageRecord, scope: trio.CancelScope) -> None:
        with scope:
            for pause in _pauses():
                try:
                    async with self._turns[pin.owner].limiter:
                        await self._complete_image(pin)
                    break
                except NsfsError as error:
                    log.warning("%s is pinned, and not complete yet: %s", pin.reference, error)
                await trio.sleep(pause)
            log.info("complete, and needs no registry: %s", pin.reference)
        if self._pins.get(_pin_key(pin)) is scope:
            del self._pins[_pin_key(pin)]

    async def _complete_image(self, pin: ImageRecord) -> None:
        blobs = blobs_of(pin)
        for record in self._records.layers():
            if record.blob in blobs:
                await self._complete(record.key, pin.owner)

    async def _complete(self, key: LayerKey, owner: str) -> None:
        async with self._locks[key]:
            await self._contents.complete(key, owner)

    # What is in use

    def follow(self, used: Collection[InUse]) -> None:
        """These are in use from now on, and nothing else is."""
        if not self._follows_use:
            return
        self._used = dict.fromkeys(used)
        self._settled &= self._used.keys()
        self._stop(lambda each: each not in self._used)
        for owner in dict.fromkeys(each.owner for each in used):
            if not self._turns[owner].is_running and self._next(owner) is not None:
                self._turns[owner].is_running = True
                self._nursery.start_soon(self._complete_used, owner, self._turns[owner])

    def give_up(self, keys: Collection[LayerKey]) -> None:
        """Fetch nothing more of these while they are in use: their contents are to go."""
        self._settled |= {each for each in self._used if each.key in keys}
        self._stop(lambda each: each.key in keys)

    def _stop(self, is_meant: Callable[[InUse], bool]) -> None:
        for turn in self._turns.values():
            if turn.current is not None and is_meant(turn.current[0]):
                turn.current[1].cancel()

    def _next(self, owner: str) -> InUse | None:
        return next((each for each in self._used if each.owner == owner and each not in self._settled), None)

    async def _complete_used(self, owner: str, turn: _Turn) -> None:
        pauses = _pauses()
        while (used := self._next(owner)) is not None:
            if (left := _QUIET - self._contents.quiet_for()) > 0:
                await trio.sleep(left)
                continue
            with trio.CancelScope() as scope:
                turn.current = used, scope
                try:
                    async with turn.limiter:
                        await self._complete(used.key, used.owner)
                    self._settled.add(used)
                    pauses = _pauses()
                except NsfsError as error:
                    log.info("layer %s is not complete: %s", used.key.blob, error)
                    if not error.transient or isinstance(error, NoSpaceError):
                        self._settled.add(used)
                    else:
                        await trio.sleep(next(pauses))
            turn.current = None
        turn.is_running = False


def _pauses() -> Iterator[float]:
    pause = _PAUSE_LEAST
    while True:
        yield pause
        pause = min(2 * pause, _PAUSE_MOST)


def blobs_of(record: ImageRecord) -> list[Digest]:
    """The digests of an image's layers."""
    document = oci.Document(record.manifest, record.media_type, record.manifest_digest)
    return [layer.digest for layer in oci.parse_manifest(document).layers]


def _pin_key(pin: ImageRecord) -> str:
    return f"{pin.owner} {pin.manifest_digest}"
