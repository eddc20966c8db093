"""The index of a domain: which contents have which extents, which addresses are given out, which layers there are.

Owns `index.lmdb`; `_Databases` below is the only description of its keys and values. Refuses a file of a newer format.

Concurrency: a worker and its jobs may have it open at the same time, each through an environment opened after its own
fork; LMDB lets one of them write at a time. Every call is one transaction, begun and ended inside the call, and every
commit is synced before the call returns. Calls block: not for an event loop that has readers waiting, `layer` apart.

Invariants: an address is given out once and never again; a content, once registered, keeps its extent; a slab counts as
committed exactly if a layer was committed with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias, TypeVar

import lmdb
import msgspec

from nsfs.errors import CorruptError, DeniedError, NoSpaceError, NotFoundError, NsfsError, UnsupportedError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.pool import Access, Extent, ImageRecord, LayerKey, LayerRecord, MapRecord, Slab
from nsfs.store.crypt import SALT_SIZE
from nsfs.store.databases import mapped_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from lmdb import _Database

    from nsfs.store.crypt import DomainKey

    _Transaction: TypeAlias = lmdb.Transaction[bytes]

__all__ = ["DomainIndex", "Extent", "LayerKey", "LayerRecord", "MapRecord", "Slab", "check_key", "open_index"]

VERSION = 2
"""Of the format of `index.lmdb`, where the domain has a key."""

PLAIN_VERSION = 1
"""Of its format where it has none."""

FIRST_ADDRESS = 1 << 30
"""Nothing lies below: 0 is never an address, and the pool keeps its headers there."""

END_ADDRESS = (1 << 44) - 4096
"""The largest file that ext4 allows with blocks of 4 KiB: 2**32 - 1 of them."""

SLAB = 64 << 20
"""The least that is given out at once."""

SLAB_UNIT = 32 << 10
"""Slabs are multiples of it: the addresses behind one byte of the bitmap."""

MAP_SIZE = 64 << 30
"""Room in address space, not on disk, for some 500 million contents; fixed, so that no process ever has to follow."""

_ORIGINS = 8

_NAME = "the index"

T = TypeVar("T")

_EXTENT = struct.Struct("<QQ")
_SLAB = struct.Struct("<QB")
_ADDRESS = struct.Struct(">Q")
_ORIGIN = re.compile(r"(?:[0-9a-f]{16})?")
_INDEX_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,199}")


def check_key(key: LayerKey) -> LayerKey:
    """`key` itself, if its index's name may become part of a path; raises UsageError."""
    if _INDEX_NAME.fullmatch(key.index) is None or _ORIGIN.fullmatch(key.origin) is None:
        raise UsageError(f"not the name of a layer's index: {key.index[:200]!r}")
    return key


class _Databases(NamedTuple):
    """The schema. Integers are little-endian, except in keys, where big-endian makes order."""

    about: _Database
    """b"version" -> decimal digits; b"salt" -> random bytes, of an index whose domain has a key."""
    by_content: _Database
    """BLAKE3 of a content -> u64 address, u64 size."""
    slabs: _Database
    """u64 address -> u64 size, u8 (1 once a layer with it is committed)."""
    layers: _Database
    """blob digest, b"/", name of the index, b"@" and origin where it has one -> LayerRecord as a msgpack map."""
    maps: _Database
    """map ID -> MapRecord as a msgpack map."""
    origins: _Database
    """blob digest, and b" ", origin, b" ", owner where several share the domain -> names of repositories as a msgpack
    array, the latest first."""
    images: _Database
    """raw sha256 of (complete reference, b" ", platform) -> ImageRecord as a msgpack map."""


def _decode_hook(kind: type, value: object) -> object:
    if kind is Digest:
        return Digest(str(value))
    raise NotImplementedError(kind)


_encode = msgspec.msgpack.Encoder(enc_hook=str).encode
_decode_layer = msgspec.msgpack.Decoder(LayerRecord, dec_hook=_decode_hook).decode
_decode_map = msgspec.msgpack.Decoder(MapRecord, dec_hook=_decode_hook).decode
_decode_image = msgspec.msgpack.Decoder(ImageRecord).decode
_decode_names = msgspec.msgpack.Decoder(list[str]).decode


def _open_environment(path: str, *, readonly: bool) -> lmdb.Environment:
    if readonly and not os.path.exists(path):
        raise NotFoundError(f"there is no index: {path}")
    return lmdb.open(
        path,
        map_size=MAP_SIZE,
        subdir=False,
        readonly=readonly,
        mode=0o600,
        max_dbs=len(_Databases._fields),
        writemap=False,
    )


def _check_version(found: bytes, path: str, key: DomainKey | None) -> None:
    if int(found) > VERSION:
        raise UnsupportedError(
            f"the index has a newer format: {path}: {int(found)}",
            hint=f"this nsfs reads format {VERSION}; use the release that wrote it",
        )
    if int(found) != _version(key):
        raise DeniedError(
            f"the index is {'not ' if key else ''}encrypted, unlike what its domain has a key for: {path}"
        )


def _version(key: DomainKey | None) -> int:
    return VERSION if key else PLAIN_VERSION


def open_index(path: str, key: DomainKey | None = None, *, readonly: bool = False) -> DomainIndex:
    """Open `index.lmdb` at `path`, made if it does not exist (unless `readonly`).

    At most one may be open per path and process, and none may be carried over a fork.
    Raises NotFoundError, UnsupportedError (a newer format), CorruptError, NoSpaceError, DeniedError (without the key).
    """
    with mapped_errors(_NAME, path):
        environment = _open_environment(path, readonly=readonly)
        try:
            databases, salt = _open_databases(environment, path, key, readonly=readonly)
            return DomainIndex(environment, path, databases, salt)
        except BaseException:
            environment.close()
            raise


def _open_databases(
    environment: lmdb.Environment, path: str, key: DomainKey | None, *, readonly: bool
) -> tuple[_Databases, bytes]:
    environment.reader_check()
    names = [name.encode() for name in _Databases._fields]
    about = environment.open_db(names[0], create=not readonly)
    with environment.begin(db=about, write=not readonly) as txn:
        found = txn.get(b"version")
        if found is not None:
            _check_version(found, path, key)
        elif not readonly:
            txn.put(b"version", str(_version(key)).encode())
            txn.put(b"salt", os.urandom(SALT_SIZE) if key else b"")
        salt = txn.get(b"salt") or b""
    return _Databases(about, *(environment.open_db(name, create=not readonly) for name in names[1:])), salt


class DomainIndex:
    """An open `index.lmdb`. `close` it, or use it as a context manager."""

    def __init__(self, environment: lmdb.Environment, path: str, databases: _Databases, salt: bytes) -> None:
        self.salt = salt
        """What makes keystreams over its addresses its own; empty where the domain has no key."""
        self._environment = environment
        self._path = path
        self._db = databases

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the environment; nothing is lost, as every commit was synced."""
        self._environment.close()

    @contextmanager
    def _transaction(self, database: _Database, *, write: bool = False) -> Iterator[_Transaction]:
        with mapped_errors(_NAME, self._path), self._environment.begin(db=database, write=write) as txn:
            yield txn

    # Addresses

    def reserve(self, size: int = SLAB) -> Slab:
        """Give out addresses that nobody had before: at least `size` bytes and 64 MiB, a multiple of 32 KiB.

        Durable before it returns. Raises NoSpaceError when the address space is used up.
        """
        size = -(-max(size, SLAB) // SLAB_UNIT) * SLAB_UNIT
        with self._transaction(self._db.slabs, write=True) as txn:
            address = _next_address(txn)
            if address + size > END_ADDRESS:
                raise NoSpaceError(f"the addresses of the domain are used up: {self._path}")
            txn.put(_ADDRESS.pack(address), _SLAB.pack(size, 0))
        return Slab(address, size)

    def reserved(self) -> int:
        """How many bytes of addresses are given out."""
        with self._transaction(self._db.slabs) as txn:
            return _next_address(txn) - FIRST_ADDRESS

    def orphan_slabs(self) -> list[Slab]:
        """Slabs that no layer was ever committed with: of passes that are under way, or were interrupted."""
        with self._transaction(self._db.slabs) as txn:
            rows = [(_ADDRESS.unpack(key)[0], *_SLAB.unpack(value)) for key, value in txn.cursor()]
        return [Slab(address, size) for address, size, committed in rows if not committed]

    def forget_slab(self, slab: Slab) -> None:
        """Count `slab` as committed: its owner ended without a layer and its content was evicted."""
        with self._transaction(self._db.slabs, write=True) as txn:
            txn.put(_ADDRESS.pack(slab.address), _SLAB.pack(slab.size, 1))

    # Contents

    def known(self, digest: bytes) -> Extent | None:
        """The extent of the content with this BLAKE3 hash, if the domain has one."""
        with self._transaction(self._db.by_content) as txn:
            value = txn.get(digest)
        return None if value is None else Extent(*_EXTENT.unpack(value))

    def contents_of(self, digests: Iterable[bytes]) -> dict[bytes, Extent]:
        """The extents of those of `digests` (BLAKE3) that the domain has, in one transaction."""
        with self._transaction(self._db.by_content) as txn:
            return _get_extents(txn, sorted(digests))

    # Layers

    def commit_layer(self, record: LayerRecord, new_contents: list[tuple[bytes, int, int]]) -> dict[int, int]:
        """Store a layer and the contents that came with it: (BLAKE3, address, size) each, in one transaction.

        Of contents that were registered meanwhile the earlier extent stands: returns its address by the address given
        here. The caller uses that one instead, and evicts its own copy.
        """
        check_key(record.key)
        with self._transaction(self._db.layers, write=True) as txn:
            replaced = _put_contents(txn, self._db.by_content, new_contents)
            for slab in record.slabs:
                txn.put(_ADDRESS.pack(slab.address), _SLAB.pack(slab.size, 1), db=self._db.slabs)
            txn.put(_layer_key(record.key), _encode(record))
        return replaced

    def update_layer(self, key: LayerKey, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        """Replace a layer's record by what `change` makes of it, in one transaction; raises NotFoundError."""
        with self._transaction(self._db.layers, write=True) as txn:
            value = txn.get(_layer_key(key))
            if value is None:
                raise NotFoundError(f"no such layer: {key.blob} ({key.index})")
            record = change(_decode_layer(value))
            txn.put(_layer_key(key), _encode(record))
        return record

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """The record of a layer, if its index is complete."""
        with self._transaction(self._db.layers) as txn:
            value = txn.get(_layer_key(key))
        return None if value is None else self._decoded(value, _decode_layer)

    def layers(self) -> list[LayerRecord]:
        """All layers, by blob digest."""
        with self._transaction(self._db.layers) as txn:
            values = [value for _, value in txn.cursor()]
        return [self._decoded(value, _decode_layer) for value in values]

    # Maps, and where blobs come from

    def map(self, map_id: str) -> MapRecord | None:
        """The record of a map."""
        with self._transaction(self._db.maps) as txn:
            value = txn.get(map_id.encode())
        return None if value is None else self._decoded(value, _decode_map)

    def put_map(self, record: MapRecord) -> None:
        """Store the record of a map."""
        with self._transaction(self._db.maps, write=True) as txn:
            txn.put(record.id.encode(), _encode(record))

    def origins(self, blob: Digest, access: Access) -> list[tuple[str, str]]:
        """The repositories that are known to have a blob, the latest first, each with whose knowledge that is.

        Where several share the domain, and no owner is named, those that any of them knows.
        """
        exact = not access.origin or access.owner
        prefix = _origin_key(blob, access)
        with self._transaction(self._db.origins) as txn:
            if exact:
                found = [(prefix, txn.get(prefix))]
            else:
                cursor = txn.cursor()
                cursor.set_range(prefix)
                found = list(takewhile(lambda pair: pair[0].startswith(prefix), cursor))
        lists = [(key[len(prefix) :].decode(), self._decoded(value, _decode_names)) for key, value in found if value]
        return [(access.owner or owner, name) for owner, names in lists for name in names]

    def put_origin(self, blobs: Collection[Digest], repository: str, access: Access) -> None:
        """Remember that a repository has these blobs; the latest few of each are kept. Writes only what is new."""
        known = {blob: [name for _, name in self.origins(blob, access)] for blob in blobs}
        fresh = {blob: names for blob, names in known.items() if names[:1] != [repository]}
        if fresh:
            with self._transaction(self._db.origins, write=True) as txn:
                for blob, names in fresh.items():
                    latest = [repository, *(name for name in names if name != repository)]
                    txn.put(_origin_key(blob, access), _encode(latest[:_ORIGINS]))

    def image(self, key: str) -> ImageRecord | None:
        """What an image was when it was last resolved; `key` is its complete reference, a space and its platform."""
        with self._transaction(self._db.images) as txn:
            value = txn.get(_image_key(key))
        return None if value is None else self._decoded(value, _decode_image)

    def put_image(self, key: str, record: ImageRecord) -> None:
        """Remember an image. Writes only what is new."""
        if self.image(key) != record:
            with self._transaction(self._db.images, write=True) as txn:
                txn.put(_image_key(key), _encode(record))

    def _decoded(self, value: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(value)
        except (msgspec.DecodeError, NsfsError) as error:
            raise CorruptError(f"the index has a record that cannot be read: {self._path}: {error}") from error


def _next_address(txn: _Transaction) -> int:
    cursor = txn.cursor()
    if not cursor.last():
        return FIRST_ADDRESS
    return int(_ADDRESS.unpack(cursor.key())[0] + _SLAB.unpack(cursor.value())[0])


def _image_key(key: str) -> bytes:
    """LMDB's keys end at 511 bytes, the directory of a layout does not."""
    return hashlib.sha256(key.encode()).digest()


def _origin_key(blob: Digest, access: Access) -> bytes:
    return (f"{blob} {access.origin} {access.owner}" if access.origin else blob).encode()


def _layer_key(key: LayerKey) -> bytes:
    return f"{key.blob}/{key.index}{'@' + key.origin if key.origin else ''}".encode()


def _get_extents(txn: _Transaction, digests: list[bytes]) -> dict[bytes, Extent]:
    return {key: Extent(*_EXTENT.unpack(value)) for key, value in txn.cursor().getmulti(digests)}


def _put_contents(txn: _Transaction, database: _Database, contents: list[tuple[bytes, int, int]]) -> dict[int, int]:
    rows = sorted((digest, _EXTENT.pack(address, size)) for digest, address, size in contents)
    cursor = txn.cursor(db=database)
    _, added = cursor.putmulti(rows, overwrite=False)
    if added == len(rows):
        return {}
    extents = {key: _EXTENT.unpack(value)[0] for key, value in cursor.getmulti([digest for digest, _ in rows])}
    return {address: extents[digest] for digest, address, _ in contents if extents[digest] != address}
