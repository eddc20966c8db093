"""Layers nobody thought of: hypothesis strategies for entries as a parser would give them, and plain constructors.

The names are few, so that entries meet: files over directories, links to what was replaced, whiteouts beside names.
Symlinks have names of their own (`_LINK_NAMES`), under which whiteouts are never put: what a whiteout below a symlink
means is a matter of order, and has tests of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from nsfs.model.layer import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_ADDRESS = 1 << 30

_NAMES = (b"a", b"b", b"c", b" ", b"-", b"\xff\xfe", b"n" * 255)
_LINK_NAMES = (b"s", b"t")


def directory(path: bytes, mode: int = 0o755, **fields: Any) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode, *_owner(fields), **fields)


def regular(path: bytes, size: int = 1, mode: int = 0o644, **fields: Any) -> Entry:
    return Entry(path, Kind.REGULAR, mode, *_owner(fields), size=size, **fields)


def symlink(path: bytes, target: bytes, **fields: Any) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, *_owner(fields), link=target, **fields)


def hardlink(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.HARDLINK, 0o644, 0, 0, 0, link=target)


def device(path: bytes, kind: Kind, number: tuple[int, int], mode: int = 0o600) -> Entry:
    return Entry(path, kind, mode, 0, 0, 0, device=number)


def place_entries(entries: Sequence[Entry], first: int = FIRST_ADDRESS) -> list[int]:
    """An extent of its own for every regular file."""
    addresses = []
    for entry in entries:
        addresses.append(first if entry.size else 0)
        first += -(-entry.size // 4096) * 4096
    return addresses


def _owner(fields: dict[str, Any]) -> tuple[int, int, int]:
    return fields.pop("uid", 0), fields.pop("gid", 0), fields.pop("mtime_ns", 0)


def paths(names: Sequence[bytes] = _NAMES + _LINK_NAMES, depth: int = 4) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=depth).map(b"/".join)


_ids = st.sampled_from([0, 1, 1000, 0xFFFFFFFE])
_modes = st.sampled_from([0, 0o644, 0o755, 0o4755, 0o7777])
_times = st.sampled_from([0, 1, -1, 1_700_000_000_123_456_789, -5_000_000_001, 1 << 62])
_xattrs = st.lists(
    st.tuples(
        st.sampled_from([b"user.a", b"user.long" + b"x" * 200, b"security.other", b"trusted.overlay.opaque"]),
        st.binary(max_size=20) | st.just(b"v" * 900),
    ),
    max_size=3,
).map(tuple)
_attributes = st.fixed_dictionaries({"uid": _ids, "gid": _ids, "mtime_ns": _times, "xattrs": _xattrs})
_targets = st.builds(
    bytes.__add__,
    st.sampled_from([b"", b"/", b"../", b"./"]),
    paths(names=(b"a", b"b", b"c", b"s", b"t", b"..")),
)


def _directories() -> st.SearchStrategy[Entry]:
    return st.builds(
        lambda path, mode, fields: directory(path, mode, **fields), st.just(b"") | paths(_NAMES), _modes, _attributes
    )


def _files() -> st.SearchStrategy[Entry]:
    sizes = st.sampled_from([0, 1, 4095, 4096, 4097, 100_000])
    return st.builds(
        lambda path, size, mode, fields: regular(path, size, mode, **fields), paths(), sizes, _modes, _attributes
    )


def _symlinks() -> st.SearchStrategy[Entry]:
    in_directory = st.builds(lambda parent, name: parent + b"/" + name, paths(_NAMES), st.sampled_from(_LINK_NAMES))
    return st.builds(symlink, in_directory | st.sampled_from(_LINK_NAMES), _targets)


def _marks() -> st.SearchStrategy[Entry]:
    names = st.sampled_from([b".wh.a", b".wh.b", b".wh.s", b".wh.n", b".wh..wh..opq", b".wh..wh.plnk", b".wh..wh.aufs"])
    in_directory = st.builds(lambda parent, name: parent + b"/" + name, paths(_NAMES, depth=3), names)
    return (in_directory | names).map(lambda path: regular(path, 0))


def _devices() -> st.SearchStrategy[Entry]:
    numbers = st.tuples(st.integers(0, 4095), st.integers(1, (1 << 20) - 1))
    return st.builds(device, paths(_NAMES), st.sampled_from([Kind.CHARACTER, Kind.BLOCK]), numbers) | st.builds(
        lambda path, kind: Entry(path, kind, 0o600, 0, 0, 7), paths(_NAMES), st.sampled_from([Kind.FIFO, Kind.SOCKET])
    )


_LINKS = st.builds(hardlink, paths(), paths())
_ENTRIES = st.one_of(_directories(), _directories(), _files(), _files(), _symlinks(), _marks(), _LINKS, _devices())


@st.composite
def layers(draw: st.DrawFn, max_size: int = 12) -> list[Entry]:
    """One layer's entries. Most hard links lead to an earlier entry."""
    entries = draw(st.lists(_ENTRIES, max_size=max_size))
    return [_aimed(draw, entry, entries[:index]) for index, entry in enumerate(entries)]


def _aimed(draw: st.DrawFn, entry: Entry, earlier: list[Entry]) -> Entry:
    targets = [other.path for other in earlier if other.kind is not Kind.DIRECTORY and b".wh." not in other.path]
    if entry.kind is not Kind.HARDLINK or not targets or not draw(st.integers(0, 9)):
        return entry
    return hardlink(entry.path, draw(st.sampled_from(targets)))


def images(max_layers: int = 4) -> st.SearchStrategy[list[list[Entry]]]:
    """The layers of an image, lowest first."""
    return st.lists(layers(), min_size=1, max_size=max_layers)
