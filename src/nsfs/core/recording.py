"""Recordings: what the views of a mount read, in the order of first use, until the start that they belong to is over.

Owns the recordings that run, each by the tag that its views have in their names, and the way from addresses to the
streams that every domain has in common. A recording begins with the first read. It is over when nothing new was read
for a while, when its views go, or when it has lasted too long; then its profile is kept. One that its worker does not
survive is lost, and its views are served all the same.

Concurrency: one event loop; what was noted is translated and kept in a thread, when nothing is noted any more.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import trio

from nsfs.core.fetchplan import locate
from nsfs.errors import NsfsError
from nsfs.model.policy import parse_view_name
from nsfs.model.profile import MAX_RUNS, ProfiledLayer, Run, plan_profile, stream_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from nsfs.core.fetchplan import Table
    from nsfs.model.digest import Digest
    from nsfs.model.pool import LayerKey, MapRecord
    from nsfs.model.profile import Profile

log = logging.getLogger(__name__)

QUIET: Final = 10.0
"""Seconds without anything new, after which a start is over."""
LONGEST: Final = 300.0
"""Seconds of a recording, from its first read; and of waiting for that."""


class Catalog(Protocol):
    """The domain's records."""

    def map(self, map_id: str) -> MapRecord | None:
        """A map."""


class Store(Protocol):
    """Where profiles are kept. Calls block."""

    def put(self, image: Digest, owner: str, profile: Profile) -> None:
        """Keep one; raises NsfsError."""


class Recording:
    """One that runs, or did."""

    def __init__(
        self, image: Digest, owner: str, layers: Sequence[LayerKey], flaw: str, quiet: float, *, begun: float = 0.0
    ) -> None:
        self.image = image
        self.owner = owner
        self.layers = tuple(dict.fromkeys(layers))
        """Lowest first."""
        self.uses: dict[tuple[str, int, int], None] = {}
        """Map, address and size of each read, in the order in which they first came."""
        self.flaw = flaw
        self.starter = ""
        """Whose start it is, where he may ask for it again."""
        self.kept = trio.Event()
        """Set when all is done, whether or not there was anything to keep."""
        self._quiet = quiet
        self._begun = begun
        self._over = trio.Event()
        self._under_way = 0
        self._first = self._last = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing is noted any more."""
        return self._over.is_set()

    @property
    def noted(self) -> int:
        """Bytes that were read so far."""
        return sum(size for _, _, size in self.uses)

    @property
    def is_under_way(self) -> bool:
        """Whether its start reads, or is to be expected to: what was prepared long ago may never start."""
        return bool(self.uses) or trio.current_time() - self._begun < self._quiet

    @property
    def seconds(self) -> float:
        """From the first read to the end of the last new one."""
        return self._last - self._first

    @contextmanager
    def reading(self, map_id: str, address: int, size: int) -> Iterator[None]:
        """Note a read, which lasts as long as the block."""
        use = (map_id, address, size)
        if self.is_over or use in self.uses:
            yield
            return
        self._note(use)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._last = trio.current_time()

    def _note(self, use: tuple[str, int, int]) -> None:
        self._first = self._first if self.uses else trio.current_time()
        self.uses[use] = None
        if len(self.uses) == MAX_RUNS:
            self.flaw = f"it was ended after so many reads: {MAX_RUNS}"
            self.end()

    def end(self) -> None:
        """Note nothing more."""
        self._over.set()

    async def wait_over(self, longest: float) -> None:
        """Return when the start is over, at the latest so many seconds after its first read."""
        while not self.is_over and (rest := min(self._rest(), self._left(longest))) > 0:
            with trio.move_on_after(rest):
                await self._over.wait()
        if not self.is_over and self._left(longest) <= 0:
            self.flaw = f"it was ended after {longest:g} s"
        self.end()

    def _rest(self) -> float:
        """Seconds until it can be over at the earliest."""
        if not self.uses or self._under_way:
            return self._quiet
        return self._last + self._quiet - trio.current_time()

    def _left(self, longest: float) -> float:
        """Seconds until it is over at the latest."""
        return (self._first if self.uses else self._begun) + longest - trio.current_time()


class Recordings:
    """The service."""

    def __init__(
        self,
        catalog: Catalog,
        open_table: Callable[[LayerKey], Table],
        store: Store,
        nursery: trio.Nursery,
        *,
        quiet: float = QUIET,
        longest: float = LONGEST,
    ) -> None:
        self._catalog = catalog
        self._open_table = open_table
        self._store = store
        self._nursery = nursery
        self._quiet = quiet
        self._longest = longest
        self._running: dict[str, Recording] = {}

    def begin(self, image: Digest, owner: str, layers: Sequence[LayerKey], flaw: str = "", starter: str = "") -> str:
        """Begin to record what is read of an image's layers (lowest first); gives the tag for the views' names.

        Views of that tag are mounted by nobody yet, so that no page of them is in memory. `flaw` says that something
        else is read, too.
        """
        tag = secrets.token_hex(4)
        recording = self._running[tag] = Recording(image, owner, layers, flaw, self._quiet, begun=trio.current_time())
        recording.starter = starter
        self._nursery.start_soon(self._run, tag, recording)
        return tag

    def are_running(self) -> bool:
        """Whether a start is being recorded, or about to be."""
        return self.count() > 0

    def about(self, layers: Collection[LayerKey]) -> Recording | None:
        """The one that notes what is read of exactly these layers, or is about to."""
        return next((each for each in self._running.values() if set(each.layers) == set(layers)), None)

    def count(self) -> int:
        """How many there are."""
        return sum(recording.is_under_way for recording in self._running.values())

    def of(self, tag: str) -> Recording | None:
        """The recording with this tag, while it runs."""
        return self._running.get(tag)

    def begin_first(self, image: Digest, owner: str, layers: Sequence[LayerKey], flaw: str, starter: str) -> str:
        """As `begin`; but "" while somebody else's start of it is recorded, and the same tag for who asks again.

        What was prepared and is not started keeps nobody else from being recorded.
        """
        for tag, running in self._running.items():
            if (running.image, running.owner) == (image, owner):
                if running.starter == starter and not running.is_over:
                    return tag
                if running.is_under_way or running.is_over:
                    return ""
                running.end()
        return self.begin(image, owner, layers, flaw, starter)

    def end(self, views: Iterable[str]) -> None:
        """End the recordings of views that go."""
        for tag in self._running and {parse_view_name(view).recording for view in views}:
            if (recording := self.of(tag)) is not None:
                recording.end()

    async def wait_kept(self) -> None:
        """Return when everything is kept of recordings that are over."""
        for recording in list(self._running.values()):
            if recording.is_over:
                await recording.kept.wait()

    async def _run(self, tag: str, recording: Recording) -> None:
        try:
            await recording.wait_over(self._longest)
            if recording.uses:
                await trio.to_thread.run_sync(self._keep, recording)
        except NsfsError as error:
            log.warning("a profile is not kept: %s: %s", recording.image, error)
        except Exception:
            log.exception("a bug: no profile of image %s", recording.image)
        finally:
            del self._running[tag]
            recording.uses.clear()
            recording.kept.set()

    def _keep(self, recording: Recording) -> None:
        layers = [ProfiledLayer(str(key.blob), stream_of(key.index)) for key in recording.layers]
        profile = plan_profile(
            layers, self._runs(recording), flaw=recording.flaw, recorded=time.time(), seconds=recording.seconds
        )
        if profile.runs:
            self._store.put(recording.image, recording.owner, profile)
            log.info("kept a profile of %s: %d runs, %d bytes", recording.image, len(profile.runs), profile.size)

    def _runs(self, recording: Recording) -> Iterator[Run]:
        """What was read, in coordinates of the layers' streams."""
        numbers = {key: number for number, key in enumerate(recording.layers)}
        keys = {map_id: self._keys(map_id) for map_id, _, _ in recording.uses}
        tables = {key: self._open_table(key) for key in {each for found in keys.values() for each in found}}
        for map_id, address, size in recording.uses:
            _, pieces = locate([tables[key] for key in keys[map_id]], [(address, size)])
            for piece in pieces:
                key = keys[map_id][piece.layer]
                if key in numbers:
                    yield Run(numbers[key], piece.stream, piece.length)

    def _keys(self, map_id: str) -> list[LayerKey]:
        """The layers whose addresses a map may have, in the order in which they are asked."""
        record = self._catalog.map(map_id)
        return [] if record is None else list(dict.fromkeys([record.key, *record.lowers]))
