"""What goes when room runs short: pure decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nsfs.model.cache import HeldImage, HeldLayer, Limits, plan_eviction, plan_images, plan_prune, plan_room

LIMITS = Limits(most=1000, reserve=100, high=0.9, low=0.5)


def held(blob: str, **more: object) -> HeldLayer:
    usual = {"index": "plain", "local": 10, "size": 20, "used": 1.0, "mounted": False, "pinned": False, "returns": True}
    return HeldLayer(blob=blob, **{**usual, **more})  # type: ignore[arg-type]


layers = st.lists(
    st.builds(
        held,
        st.text("abc", min_size=1, max_size=2),
        local=st.integers(0, 50),
        used=st.floats(0, 9),
        mounted=st.booleans(),
        pinned=st.booleans(),
        returns=st.booleans(),
    ),
    max_size=12,
)


def test_nothing_goes_below_the_high_mark_and_then_down_to_the_low_one() -> None:
    assert plan_room(900, 500, LIMITS) == 0
    assert plan_room(901, 500, LIMITS) == 401
    assert plan_room(0, 40, LIMITS) == 60
    assert plan_room(901, 0, LIMITS) == 401
    assert plan_room(901, -400, LIMITS) == 500


@given(layers, st.integers(0, 200))
def test_enough_goes_or_all_that_may_and_what_is_mounted_last(found: list[HeldLayer], need: int) -> None:
    going = plan_eviction(found, need)
    free = sum(layer.local for layer in going)
    may = [layer for layer in found if layer.local and layer.returns and not layer.pinned]
    assert all(layer in may for layer in going)
    assert free >= need or len(going) == len(may)
    assert free - (going[-1].local if going else 0) < max(need, 1)
    order = [(layer.mounted, layer.used) for layer in going]
    assert order == sorted(order)
    left = [layer for layer in may if layer not in going]
    assert not left or not going or max(order) <= min((layer.mounted, layer.used) for layer in left)


@given(layers, st.floats(0, 9))
def test_pruning_takes_what_is_idle_for_long_enough(found: list[HeldLayer], before: float) -> None:
    going = plan_prune(found, before)
    assert all(layer.used < before and layer.is_idle for layer in going)
    assert all(layer in going or not layer.is_idle or layer.used >= before for layer in found)


def test_an_image_has_what_its_layers_have_in_its_own_domain() -> None:
    found = [held("a", domain="x", used=5.0), held("b", domain="x", mounted=True), held("a", domain="y")]
    images = [
        HeldImage(reference="one", digest="1", blobs=["a", "b", "a"], pinned=True, domain="x"),
        HeldImage(reference="two", digest="2", blobs=["b"], pinned=False, domain="x"),
        HeldImage(reference="none", digest="3", blobs=["c"], pinned=False, domain="x"),
    ]
    one, two = plan_images(found, images)
    assert (one.reference, one.local, one.size, one.used, one.mounted, one.pinned) == ("one", 20, 40, 5.0, False, True)
    assert (two.reference, two.local, two.mounted, two.pinned) == ("two", 10, True, False)
