"""Whatever on disk has a newer format is refused: by its file's name, with what to do, and as it is."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import lmdb
import pytest

import stores
from nsfs.errors import UnsupportedError
from nsfs.store.index import open_index
from nsfs.store.keys import Keys
from nsfs.store.layers import load_index, open_table
from nsfs.store.layout import DomainLayout, Layout
from nsfs.store.meta import open_meta
from nsfs.store.poolfiles import create_bitmap

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DOMAIN = "ns/default"
NEWER = 9
EXIT = 9


class Kind(NamedTuple):
    """Of a file: the one in a store, and what opens it."""

    store: str
    pattern: str
    bump: Callable[[str], None]
    open: Callable[[Layout, str], object]


def bump_header(path: str) -> None:
    """Every header begins with eight bytes of magic and the version."""
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(NEWER.to_bytes(4, "little"))


def bump_database(path: str, *, subdir: bool) -> None:
    with lmdb.open(path, subdir=subdir, max_dbs=8) as raw, raw.begin(db=raw.open_db(b"about"), write=True) as txn:
        txn.put(b"version", b"%d" % NEWER)


def open_key(layout: Layout, _path: str) -> object:
    return Keys(layout, None).load(DOMAIN)


def domain(layout: Layout) -> DomainLayout:
    return layout.domain(DOMAIN, Keys(layout, None).load(DOMAIN))


def open_pool(layout: Layout, _path: str) -> object:
    return create_bitmap(domain(layout))


def open_domain_index(layout: Layout, path: str) -> object:
    return open_index(path, domain(layout).key)


def open_layer_index(layout: Layout, path: str) -> object:
    return load_index(os.path.dirname(path), domain(layout).key)


def open_layer_table(layout: Layout, path: str) -> object:
    return open_table(os.path.dirname(path), domain(layout).key)


def open_records(_layout: Layout, path: str) -> None:
    with open_meta(path):
        pass


in_file, in_directory = partial(bump_database, subdir=False), partial(bump_database, subdir=True)
KINDS = {
    "key": Kind("under-a-key", "keys/*", bump_header, open_key),
    "disk": Kind("before-keys", "domains/*/disk", bump_header, open_pool),
    "encrypted disk": Kind("under-a-key", "domains/*/disk", bump_header, open_pool),
    "bitmap": Kind("before-keys", "domains/*/present", bump_header, open_pool),
    "index of a domain": Kind("before-keys", "domains/*/index.lmdb", in_file, open_domain_index),
    "encrypted index of a domain": Kind("under-a-key", "domains/*/index.lmdb", in_file, open_domain_index),
    "records of the daemon": Kind("before-keys", "meta.lmdb", in_directory, open_records),
    "index of a layer": Kind("before-keys", "domains/*/layers/*/*/index", bump_header, open_layer_index),
    "segments": Kind("before-keys", "domains/*/layers/*/*/segments", bump_header, open_layer_table),
    "spans": Kind("before-keys", "domains/*/layers/*/*/spans", bump_header, open_layer_table),
    "sealed file": Kind("under-a-key", "domains/*/layers/*/*/index", bump_header, open_layer_index),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_newer_format_is_refused(kind: Kind, tmp_path: Path) -> None:
    stores.open_store(kind.store, tmp_path)
    root = tmp_path / "root"
    layout = Layout(str(root), str(tmp_path / "run"))
    path = str(next(root.glob(kind.pattern)))
    kind.bump(path)
    before = snapshot(path)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=f": {NEWER}|format {NEWER}") as refused:
            kind.open(layout, path)
        assert os.path.dirname(path) in str(refused.value) or path in str(refused.value)
        assert "newer" in str(refused.value)
        assert refused.value.hint
        assert refused.value.exit_code == EXIT
    assert snapshot(path) == before


def snapshot(path: str) -> bytes:
    """What an environment, or the beginning of a file, is now."""
    with open(f"{path}/data.mdb" if os.path.isdir(path) else path, "rb") as file:
        return file.read(1 << 17)
