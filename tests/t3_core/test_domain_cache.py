"""What a domain's pool keeps: what is held, what goes or is spared, pins, and what needs no registry. On fakes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from core_sources import FakeMemory, FakeSource, FakeSources
from nsfs.core import worker_api
from nsfs.core.domain_cache import DomainCache, NotedUse, Uses
from nsfs.core.images import Images
from nsfs.core.keeping import KeptPool
from nsfs.errors import BusyError, NoSpaceError, NotFoundError, UnreachableError
from nsfs.model.oci import Platform
from nsfs.model.pool import LayerKey, LayerRecord, MapRecord
from trio_tests import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    import msgspec

    from nsfs.core.completing import InUse
    from nsfs.core.images import Image, Layer
    from nsfs.model.digest import Digest
    from nsfs.model.pool import ImageRecord

SIZE = 8192
TAG = "registry/app:one"
OTHER = "registry/app:two"


class FakePool:
    """As much of a pool as keeping wants."""

    missing = read_present = begin_reading = evict = flush = write_zeros = staticmethod(lambda *_: None)

    def write(self, address: int, data: bytes) -> None: ...


class FakeDomain(FakeMemory):
    """Catalog, layers, views, maps and what is shown, of a domain; a layer's contents are `SIZE` bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.local: dict[LayerKey, int] = {}
        self.spanless: set[LayerKey] = set()
        self.spooled: set[LayerKey] = set()
        self.made_spans: list[LayerKey] = []
        self.evicted: list[tuple[LayerKey, list[LayerKey]]] = []
        self.touched: list[set[LayerKey]] = []
        self.shown: set[str] = set()
        self.trouble: Exception | None = None
        self.events: list[tuple[str, Any]] = []

    # Catalog

    def layers(self) -> list[LayerRecord]:
        return [record_of(key, has_spans=key not in self.spanless) for key in self.local]

    def map(self, map_id: str) -> MapRecord | None:
        """A map is named by the first letters of its layer's digest."""
        for key in self.local:
            if map_id == map_id_of(key):
                return MapRecord(id=map_id, blob=key.blob, index=key.index, path="", needs_lower=False, marks=False)
        return None

    def drop_image(self, key: str) -> None:
        self.images.pop(key, None)

    def touch(self, keys: Collection[LayerKey], used: float) -> None:
        if self.trouble:
            raise self.trouble
        self.touched.append(set(keys))

    # Layers, spans and views

    def record(self, layer: Layer) -> LayerRecord | None:
        key = key_of(layer.digest)
        return record_of(key) if key in self.local else None

    def is_spooled(self, record: LayerRecord) -> bool:
        return record.key in self.spooled

    async def ensure(self, key: LayerKey, owner: str = "") -> None:
        if self.trouble:
            raise self.trouble
        self.made_spans.append(key)
        self.spanless.discard(key)

    def local_bytes(self, keys: Sequence[LayerKey]) -> int:
        return sum(self.local[key] for key in keys)

    def size_of(self, key: LayerKey) -> int:
        return SIZE

    async def evict(self, key: LayerKey, spared: Sequence[LayerKey] = ()) -> int:
        self.evicted.append((key, list(spared)))
        freed, self.local[key] = self.local[key], 0
        return freed

    async def all_maps(self, image: Image, report: object) -> None:
        """Reads what was never read."""
        for layer in image.layers:
            self.local.setdefault(key_of(layer.digest), SIZE // 2)

    # What is shown

    def maps(self) -> set[str]:
        return {name.partition("~")[0] for name in self.shown}

    def views(self) -> set[str]:
        return set(self.shown)

    def show_views(self, names: Sequence[str]) -> None:
        self.shown |= set(names)

    def hide_views(self, names: Sequence[str]) -> None:
        self.shown -= set(names)

    # Completing

    def begin(self, pin: ImageRecord) -> None:
        self.events.append(("begin", pin.manifest_digest))

    def end(self, pin: ImageRecord) -> None:
        self.events.append(("end", pin.manifest_digest))

    def follow(self, used: Collection[InUse]) -> None:
        self.events.append(("follow", {each.key for each in used}))

    def give_up(self, keys: Collection[LayerKey]) -> None:
        self.events.append(("give up", set(keys)))


class FakePrefetches:
    """What is given up, in order."""

    def __init__(self) -> None:
        self.ended: list[set[LayerKey]] = []

    def end(self, layers: Collection[LayerKey]) -> None:
        self.ended.append(set(layers))


def key_of(blob: Digest) -> LayerKey:
    return LayerKey(blob, "plain")


def map_id_of(key: LayerKey) -> str:
    return key.blob.hex[:32]


def record_of(key: LayerKey, *, has_spans: bool = True) -> LayerRecord:
    return LayerRecord(
        blob=key.blob,
        index=key.index,
        blob_size=SIZE,
        media_type="t",
        diff_id=None,
        verified="diff-id",
        stream_size=SIZE,
        files=1,
        content_bytes=SIZE,
        slabs=(),
        has_spans=has_spans,
    )


class Site:
    """A service over fakes. Images share the layer `base`, and have one of their own."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.registry = FakeSource("registry/app")
        self.digests = {
            TAG: self.registry.add_image("one", [b"base", b"own of one"]),
            OTHER: self.registry.add_image("two", [b"base", b"own of two"]),
        }
        self.domain = FakeDomain()
        fake = cast("Any", self.domain)
        self.pool = KeptPool(FakePool())  # type: ignore[arg-type]
        self.images = Images(FakeSources(self.registry), self.domain, Platform("amd64", "linux"))
        self.prefetches = FakePrefetches()
        self.uses = Uses(Catalog(self.domain), fake, fake, cast("Any", self.prefetches), nursery)
        self.cache = DomainCache(Catalog(self.domain), self.images, fake, fake, fake, fake, self.uses, fake)

    async def ask(self, method: str, params: msgspec.Struct | None = None) -> Any:
        async def report(_: object) -> None:
            await trio.lowlevel.checkpoint()

        kind, handler = (self.cache.methods() | self.pool.methods())[method]
        return await handler(params or kind(), report)

    async def read(self, *references: str, local: int = SIZE) -> list[LayerKey]:
        """Have the images' layers known, with so many bytes of each; lowest first, none twice."""
        keys: dict[LayerKey, None] = {}
        for reference in references:
            image = await self.images.resolve(reference, None)
            keys |= dict.fromkeys(key_of(layer.digest) for layer in image.layers)
        self.domain.local |= dict.fromkeys(keys, local)
        return list(keys)

    async def held(self, key: LayerKey) -> Any:
        """What Held says of a layer."""
        (found,) = [each for each in (await self.ask("Held")).layers if each.blob == str(key.blob)]
        return found


class Catalog:
    """`FakeDomain`, whose images are a method here and a mapping in `FakeMemory`."""

    def __init__(self, domain: FakeDomain) -> None:
        self._domain = domain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)

    def images(self) -> list[ImageRecord]:
        return list(self._domain.images.values())


def named(reference: str) -> worker_api.Name:
    return worker_api.Name(reference=reference)


@asynccontextmanager
async def open_site() -> AsyncIterator[Site]:
    async with trio.open_nursery() as nursery:
        yield Site(nursery)


def test_what_is_held_says_what_is_mounted_pinned_and_comes_back() -> None:
    async def body() -> None:
        async with open_site() as site:
            base, own, _ = await site.read(TAG, OTHER)
            site.domain.spanless = {own}
            site.domain.shown = {f"{map_id_of(base)}~60"}
            found = await site.held(base)
            assert (found.mounted, found.pinned, found.returns) == (True, False, True)
            assert (found.local, found.size) == (SIZE, SIZE)
            assert not (await site.held(own)).returns
            site.domain.spooled = {own}
            assert (await site.held(own)).returns
            await site.ask("Pin", named(TAG))
            assert (await site.held(own)).pinned
            held = await site.ask("Held")
            assert {each.reference: each.pinned for each in held.images} == {TAG: True, OTHER: False}

    run(body)


def test_a_pin_reads_what_was_never_read_and_says_what_is_absent() -> None:
    async def body() -> None:
        async with open_site() as site:
            said = await site.ask("Pin", named(TAG))
            assert (said.digest, said.absent) == (str(site.digests[TAG]), SIZE)
            assert ("begin", site.digests[TAG]) in site.domain.events

    run(body)


def test_pins_are_taken_up_by_the_next_worker() -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.read(OTHER)
            await site.ask("Pin", named(TAG))
            site.domain.events.clear()
            site.cache.resume()
            assert site.domain.events == [("begin", site.digests[TAG]), ("follow", set())]

    run(body)


def test_what_is_pinned_is_not_evicted_nor_what_it_shares() -> None:
    async def body() -> None:
        async with open_site() as site:
            _, own, others = await site.read(TAG, OTHER)
            await site.ask("Pin", named(TAG))
            for reference in (TAG, OTHER):
                with pytest.raises(BusyError, match="pinned"):
                    await site.ask("Evict", named(reference))
            held = (await site.ask("Held")).layers
            dropped = await site.ask("Drop", worker_api.Drop(layers=held))
            assert (dropped.layers, dropped.freed) == (1, SIZE)
            ((evicted, spared),) = site.domain.evicted
            assert evicted == others
            assert own in spared

    run(body)


def test_what_waits_for_its_checkpoints_goes_when_they_are_made() -> None:
    async def body() -> None:
        async with open_site() as site:
            base, own = await site.read(TAG)
            site.domain.spanless, site.domain.spooled = {base, own}, {own}
            held = (await site.ask("Held")).layers
            site.domain.trouble = NoSpaceError("disk full")
            assert await site.ask("Settle") == worker_api.Evicted(layers=0, freed=0)
            assert (await site.ask("Drop", worker_api.Drop(layers=held))).layers == 0
            site.domain.trouble = None
            assert await site.ask("Settle") == worker_api.Evicted(layers=1, freed=SIZE)
            assert (await site.ask("Drop", worker_api.Drop(layers=held))).layers == 1
            assert site.domain.made_spans == [own]
            assert [key for key, _ in site.domain.evicted] == [own]

    run(body)


def test_an_unpinned_image_goes() -> None:
    async def body() -> None:
        async with open_site() as site:
            base, own = await site.read(TAG)
            await site.ask("Pin", named(TAG))
            await site.ask("Unpin", named(TAG))
            assert ("end", site.digests[TAG]) in site.domain.events
            evicted = await site.ask("Evict", named(TAG))
            assert (evicted.layers, evicted.freed) == (2, 2 * SIZE)
            assert site.domain.made_spans == [base, own]
            with pytest.raises(NotFoundError, match="not pinned"):
                await site.ask("Unpin", named(TAG))

    run(body)


def test_a_tag_that_moved_is_unpinned_by_its_name() -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.ask("Pin", named(TAG))
            site.registry.add_image("one", [b"moved"])
            await site.images.resolve(TAG, None)
            assert (await site.ask("Unpin", named(TAG))).digest == str(site.digests[TAG])

    run(body)


def test_another_owners_pin_is_not_ones_own() -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.ask("Pin", worker_api.Name(reference=TAG, owner="red"))
            with pytest.raises(NotFoundError):
                await site.ask("Unpin", worker_api.Name(reference=TAG, owner="blue"))
            await site.ask("Unpin", worker_api.Name(reference=TAG, owner="red"))

    run(body)


def test_what_is_mounted_since_it_was_chosen_stays() -> None:
    async def body() -> None:
        async with open_site() as site:
            base, own = await site.read(TAG)
            idle = (await site.ask("Held")).layers
            site.domain.shown = {f"{map_id_of(base)}~60"}
            await site.ask("Drop", worker_api.Drop(layers=idle))
            assert site.domain.evicted == [(own, [base])]

            in_use = (await site.ask("Held")).layers
            dropped = await site.ask("Drop", worker_api.Drop(layers=in_use))
            assert dropped.layers == 2
            assert site.domain.local[base] == 0

    run(body)


def test_a_layer_that_is_gone_is_not_dropped() -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.read(TAG)
            chosen = (await site.ask("Held")).layers
            site.domain.local.clear()
            assert (await site.ask("Drop", worker_api.Drop(layers=chosen))).layers == 0

    run(body)


def test_offline_says_what_a_start_would_want() -> None:
    async def body() -> None:
        async with open_site() as site:
            site.registry.error = UnreachableError("gone")
            said = await site.ask("Offline", named(TAG))
            assert (len(said.missing), "nothing is known" in said.missing[0]) == (1, True)
            site.registry.error = None
            base, own = await site.read(TAG)
            site.registry.error = UnreachableError("gone")
            assert (await site.ask("Offline", named(TAG))).missing == []

            site.domain.local[own] = 4096
            said = await site.ask("Offline", named(TAG))
            assert (len(said.missing), said.absent) == (1, SIZE - 4096)
            del site.domain.local[base]
            said = await site.ask("Offline", named(TAG))
            assert [reason for reason in said.missing if "never read" in reason]
            assert len(said.missing) == 2

    run(body)


def test_use_is_noted_where_it_begins_and_where_it_ends() -> None:
    async def body() -> None:
        async with open_site() as site:
            base, own = await site.read(TAG)
            shown = NotedUse(cast("Any", site.domain), site.uses.note)
            view = f"{map_id_of(base)}~60"
            shown.show_views([view])
            shown.show_views([view])
            shown.hide_views([view, f"{map_id_of(own)}~60"])
            await trio.testing.wait_all_tasks_blocked()
            assert site.domain.touched == [{base}, {base}]
            assert site.domain.events == [("follow", {base}), ("follow", set())]
            assert site.prefetches.ended == [set(), {base}]
            site.uses.give_up([own])
            assert site.domain.events[-1] == ("give up", site.prefetches.ended[-1])

    run(body)


def test_use_that_cannot_be_noted_hinders_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with open_site() as site:
            (base, _) = await site.read(TAG)
            site.domain.trouble = NoSpaceError("full")
            site.uses.note({map_id_of(base)})
            await trio.testing.wait_all_tasks_blocked()

    run(body)
    assert caplog.messages == ["it is not noted which layers were used: full"]


def test_nothing_more_is_kept_while_the_daemon_says_so() -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.ask("Keep", worker_api.Keep(unless="the reserve is used"))
            with pytest.raises(NoSpaceError, match="reserve"):
                site.pool.write(0, b"")
            await site.ask("Keep", worker_api.Keep())
            site.pool.write(0, b"")
            assert site.pool.trouble == ""

    run(body)
