"""What labels say of a layer, and what a record of one is bound to."""

from __future__ import annotations

import msgspec
import pytest

from nsfs.errors import UsageError
from nsfs.model.filters import parse_filters
from nsfs.model.lazy import Exchange, LazyLayer, is_offered, is_unpack, lazy_name, parse_exchange, parse_offer

A, B, C = (f"sha256:{digit * 64}" for digit in "abc")
CRI = "containerd.io/snapshot/cri."
REF = "containerd.io/snapshot.ref"
LABELS = {
    REF: A,
    CRI + "image-ref": "docker.io/library/x:1",
    CRI + "manifest-digest": B,
    CRI + "layer-digest": C,
    CRI + "image-layers": C,
}


def test_labels_name_a_layer() -> None:
    assert parse_offer(LABELS) == LazyLayer(reference=f"docker.io/library/x:1@{B}", blob=C, chain=A)
    pinned = parse_offer(LABELS | {CRI + "image-ref": f"docker.io/library/x:1@{A}"})
    assert pinned == parse_offer(LABELS)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(pinned), type=LazyLayer) == pinned
    assert is_offered(LABELS)
    assert not is_offered({CRI + "image-ref": "x"})


@pytest.mark.parametrize("name", ["image-ref", "manifest-digest", "layer-digest"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        parse_offer({label: value for label, value in LABELS.items() if label != CRI + name})


@pytest.mark.parametrize("change", [{REF: "x"}, {CRI + "layer-digest": "../x"}, {CRI + "image-ref": "oci:/etc"}])
def test_what_is_malformed_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        parse_offer(LABELS | change)


def test_a_name_is_bound_to_everything() -> None:
    layer = parse_offer(LABELS)
    others = [
        parse_offer(LABELS | {label: value})
        for label, value in ((REF, B), (CRI + "layer-digest", A), (CRI + "manifest-digest", A))
    ]
    names = {
        lazy_name("ns", "nsfs", "", layer),
        lazy_name("ns2", "nsfs", "", layer),
        lazy_name("ns", "nsfs2", "", layer),
        lazy_name("ns", "nsfs", "ns/1/parent", layer),
        *(lazy_name("ns", "nsfs", "", other) for other in others),
    }
    assert len(names) == 7
    assert all(name.startswith(("ns/", "ns2/")) for name in names)


@pytest.mark.parametrize(
    ("key", "unpack"),
    [
        ("ns/1/extract-123-a_b sha256:ff", True),
        ("extract-123 sha256:ff", True),
        ("ns/1/extract-123", False),
        ("ns/1/container", False),
        ("extract-ns/1/container", False),
        ("ns/1/a/extract-1", False),
    ],
)
def test_an_unpack_is_known_by_its_key(key: str, unpack: bool) -> None:
    assert is_unpack(key) is unpack


@pytest.mark.parametrize(
    ("filters", "exchange"),
    [
        ([f'labels."{REF}"=={A},parent==""'], Exchange(A, "")),
        ([f'labels."{REF}"=={A},parent=="ns/1/x y"'], Exchange(A, "ns/1/x y")),
        ([f'labels."{REF}"=={A}'], None),
        ([f'labels."{REF}"!={A},parent==""'], None),
        ([f'labels."{REF}"=={A},parent==""', "kind==active"], None),
        ([], None),
    ],
)
def test_an_exchange_is_known_by_its_filter(filters: list[str], exchange: Exchange | None) -> None:
    assert parse_exchange(parse_filters(filters)) == exchange
