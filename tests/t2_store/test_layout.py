from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import UsageError
from nsfs.model.digest import Digest
from nsfs.model.pool import LayerKey
from nsfs.store.layout import Layout, escape_component

names = st.text(max_size=40)


@given(names, names)
def test_names_never_share_a_directory_nor_leave_it(one: str, other: str) -> None:
    try:
        escaped = [escape_component(name) for name in (one, other)]
    except UsageError:
        return
    assert (escaped[0] == escaped[1]) == (one == other)
    for name in escaped:
        assert name not in {"", ".", ".."}
        assert not set(name) & {"/", "\0"}


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 256, "/" * 86, "\ud800"])
def test_what_cannot_be_a_component_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Layout("/root", "/run").domain(name)


def test_paths_are_where_the_documents_say() -> None:
    layout = Layout("/var/lib/nsfs", "/run/nsfs")
    domain = layout.domain("ns/team-a")
    blob = Digest("sha256:" + "a" * 64)
    assert domain.disk == "/var/lib/nsfs/domains/ns%2Fteam-a/disk"
    assert domain.layer_dir(LayerKey(blob, "plain")) == f"{domain.path}/layers/{'a' * 64}/plain"
    assert domain.spool(LayerKey(blob, "plain")) == f"{domain.path}/layers/{'a' * 64}/blob.partial"
    other = LayerKey(blob, "plain", "0123456789abcdef")
    assert domain.layer_dir(other) == f"{domain.path}/layers/{'a' * 64}@0123456789abcdef/plain"
    assert os.path.dirname(domain.spool(other)) == domain.blob_dir(other)
    assert os.path.basename(domain.map(LayerKey(blob, "plain"), "0123")) == "map-0123.erofs"
    assert layout.domain_run("ns/team-a").fuse_disk("m") == "/run/nsfs/domains/ns%2Fteam-a/fuse/disks/m"
    assert len(layout.lowers) <= len("/run/nsfs/l"), "128 of them fit into a page of options"


@pytest.mark.parametrize("index", ["", "..", "a/b", "Plain", "x" * 300, "plain\n"])
def test_an_index_that_is_no_name_becomes_no_path(index: str) -> None:
    domain = Layout("/root", "/run").domain("d")
    with pytest.raises(UsageError):
        domain.layer_dir(LayerKey(Digest.of(b""), index))
