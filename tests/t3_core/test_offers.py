"""Offers and exchanges, with a registry that takes as long as the test says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

import trio_tests
from nsfs.core.exchanges import LIFE, Exchanges
from nsfs.core.ledger import Ledger
from nsfs.core.offers import Offers
from nsfs.errors import CorruptError, NsfsError, UnreachableError, UnsupportedError
from nsfs.model.filters import parse_filters
from nsfs.model.lazy import Exchange, LazyLayer, State
from nsfs.model.snapshot import Change, Kind, Record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nsfs.model.policy import Domain, ScopeRequest

A, B, C = (f"sha256:{digit * 64}" for digit in "abc")
CRI = "containerd.io/snapshot/cri."
REF = "containerd.io/snapshot.ref"
LABELS = {REF: A, CRI + "image-ref": "x:1", CRI + "manifest-digest": B, CRI + "layer-digest": C}
QUESTION = parse_filters([f'labels."{REF}"=={A},parent==""'])


def record(namespace: str, key: str = "1/extract-1 x", **more: Any) -> Record:
    fields: dict[str, Any] = {"id": 0, "parent": "", "created": 1, "updated": 1, "labels": LABELS} | more
    return Record(snapshotter="nsfs", name=f"{namespace}/{key}", namespace=namespace, kind=Kind.ACTIVE, **fields)


class Memory:
    """Records that outlive nothing."""

    def __init__(self, *records: Record) -> None:
        self.kept = list(records)

    def snapshots(self) -> list[Record]:
        return self.kept

    def last_snapshot(self) -> int:
        return max((each.id for each in self.kept), default=0)

    def change_snapshots(self, change: Change) -> None:
        self.kept = [each for each in self.kept if each != change.gone]
        self.kept += [change.put] if change.put else []


class Layers:
    """What workers say: `offered` to an offer, then one of `settled` after another."""

    wait = 10.0

    def __init__(self, offered: State | NsfsError = State.READY, *settled: State | NsfsError) -> None:
        self.offered = offered
        self.settled = list(settled)
        self.asked = 0

    def is_guest(self, request: ScopeRequest) -> bool:
        return False

    async def offer(self, request: ScopeRequest, layer: LazyLayer, *, over_local: bool) -> LazyLayer:
        self.asked += 1
        return self._say(layer, self.offered)

    async def settle(self, request: ScopeRequest, layer: LazyLayer) -> LazyLayer:
        await trio.sleep(5)
        return self._say(layer, self.settled.pop(0))

    def _say(self, layer: LazyLayer, what: State | NsfsError) -> LazyLayer:
        if isinstance(what, NsfsError):
            raise what
        return LazyLayer(
            reference=layer.reference, blob=layer.blob, chain=layer.chain, state=what, reason=f"it is {what}"
        )

    async def stack(self, snapshot: int, request: ScopeRequest, layers: object, shift: object, profile: object) -> Any:
        raise AssertionError

    async def release(self, snapshot: int) -> None:
        raise AssertionError

    def shown(self) -> dict[int, Domain]:
        return {}

    def stacked(self) -> dict[int, list[str]]:
        return {}


def offering(
    layers: Layers,
    body: Callable[[Offers, Ledger], Awaitable[None]],
    *known: Record,
    on_fenced: Callable[[Record], None] = lambda _: None,
) -> list[Record]:
    """Run `body`; gives what is remembered after it."""
    memory = Memory(*known)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ledger = Ledger(memory)
            await body(Offers(ledger, layers, nursery, on_fenced), ledger)
            nursery.cancel_scope.cancel()

    trio_tests.run(main)
    return memory.kept


def test_an_offer_is_taken_once_and_found_again() -> None:
    layers = Layers()

    async def body(offers: Offers, _ledger: Ledger) -> None:
        for _ in range(2):
            taken = await offers.take(record("red"))
            assert taken is not None
            assert offers.answer("nsfs", QUESTION, None) == [taken]
            assert offers.answer("nsfs", QUESTION, None) == []
        assert offers.answer("nsfs", parse_filters([]), None) is None

    (kept,) = offering(layers, body)
    assert (kept.kind, kept.id, layers.asked) == (Kind.COMMITTED, 1, 1)


@pytest.mark.parametrize(
    ("error", "comes_back"),
    [
        (UnsupportedError("no"), False),
        (CorruptError("no"), False),
        (UnreachableError("no"), False),
        (UnreachableError("not yet", retry_after=1), True),
    ],
)
def test_what_cannot_be_served_is_no_error_of_the_pull(error: NsfsError, comes_back: bool) -> None:
    async def body(offers: Offers, _ledger: Ledger) -> None:
        if comes_back:
            with pytest.raises(UnreachableError):
                await offers.take(record("red"))
        else:
            assert await offers.take(record("red")) is None

    assert offering(Layers(error), body) == []


def test_a_pending_layer_is_asked_after_until_it_is_known() -> None:
    layers = Layers(State.PENDING, UnreachableError("down"), UnreachableError("down"), State.READY)

    async def body(offers: Offers, _ledger: Ledger) -> None:
        assert await offers.take(record("red")) is not None
        await trio.sleep(60)

    (kept,) = offering(layers, body)
    assert kept.layer is not None
    assert kept.layer.state is State.READY


def test_a_fenced_layer_is_never_offered_again_and_is_told_of() -> None:
    told: list[Record] = []

    async def body(offers: Offers, ledger: Ledger) -> None:
        assert await offers.take(record("red")) is not None
        await trio.sleep(60)
        assert await offers.take(record("red")) is None
        (kept,) = ledger.records()
        async with ledger.lock:
            await ledger.carry_out(Change(gone=kept))
            assert await offers.take(record("red")) is None, "also when its record is gone"
            await ledger.carry_out(Change(put=kept))

    (kept,) = offering(Layers(State.PENDING, State.FENCED), body, on_fenced=told.append)
    assert kept.layer is not None
    assert (kept.layer.state, kept.layer.reason) == (State.FENCED, "it is fenced")
    assert told == [kept]

    async def resume(offers: Offers, _ledger: Ledger) -> None:
        offers.resume()

    offering(Layers(), resume, kept, on_fenced=told.append)
    assert told == [kept, kept]


def test_an_unread_layer_is_looked_after_only_where_it_is_doubted() -> None:
    layers = Layers(State.UNREAD, State.FENCED)

    async def body(offers: Offers, ledger: Ledger) -> None:
        assert await offers.take(record("red")) is not None
        await trio.sleep(60)
        assert len(layers.settled) == 1
        for _ in range(2):
            offers.doubt(list(ledger.records()))
        await trio.sleep(60)

    (kept,) = offering(layers, body)
    assert kept.layer is not None
    assert kept.layer.state is State.FENCED


def test_pending_layers_are_resumed_and_removed_ones_forgotten() -> None:
    pending = LazyLayer(reference="x", blob=C, chain=A)
    known = [record("red", f"lazy/{number}", id=number, layer=pending) for number in (1, 2)]

    async def body(offers: Offers, ledger: Ledger) -> None:
        offers.resume()
        await trio.sleep(1)
        async with ledger.lock:
            await ledger.carry_out(Change(gone=known[0]))
        await trio.sleep(60)

    (kept,) = offering(Layers(State.READY, State.READY, State.READY), body, *known)
    assert kept.id == 2
    assert kept.layer is not None
    assert kept.layer.state is State.READY


def test_one_exchange_at_a_time() -> None:
    order: list[tuple[str, float]] = []
    question = Exchange(A, "")

    async def main() -> None:
        exchanges = Exchanges()

        async def ask(namespace: str) -> None:
            await exchanges.begin(question, record(namespace))
            await trio.sleep(0.5)
            found = exchanges.answer("nsfs", question, None)
            assert found is not None
            order.append((found.namespace, trio.current_time()))

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(ask, f"ns{number}")
        assert {namespace for namespace, _ in order} == {f"ns{number}" for number in range(4)}
        assert order[-1][1] - start == pytest.approx(2.0)

    trio_tests.run(main)


def test_an_exchange_has_an_end_and_others_do_not_wait_for_it() -> None:
    question = Exchange(A, "")

    async def main() -> None:
        exchanges = Exchanges()
        start = trio.current_time()
        await exchanges.begin(question, record("red"))
        await exchanges.begin(Exchange(A, "red/1/parent"), record("red"))
        await exchanges.begin(Exchange(B, ""), record("red"))
        assert trio.current_time() == start
        assert exchanges.answer("nsfs", question, "blue") is None
        with trio.move_on_after(1):
            await exchanges.begin(question, record("green"))
        await exchanges.begin(question, record("blue"))
        assert trio.current_time() - start == pytest.approx(LIFE)
        await trio.sleep(LIFE + 1)
        assert exchanges.answer("nsfs", question, None) is None

    trio_tests.run(main)
