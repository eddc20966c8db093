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
import threading
from contextlib import contextmanager
from itertools import takewhile
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias, TypeVar

import lmdb
import msgspec

from nsfs.errors import CorruptError, DeniedError, NoSpaceError, NotFoundError, NsfsError, UnsupportedError, UsageError
from nsfs.model.digest import Digest
from nsfs.model.pool import Access, Extent, GrantRecord, ImageRecord, LayerKey, LayerRecord, MapRecord, Slab
from nsfs.store.crypt import SALT_SIZE
from nsfs.store.databases import mapped_errors
from nsfs.store.sealed import PlainRecords, SealedRecords

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from lmdb import _Database

    from nsfs.store.crypt import DomainKey
    from nsfs.store.sealed import Records

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

_DIGEST = 32
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
    """The schema. Integers are little-endian, except in keys, where big-endian makes order.

    Where the domain has a key, all but `about` and `slabs` is under it: keys and values of `by_content` block by block,
    of the others the key's keyed hash and the value sealed (`store.sealed.SealedRecords`).
    """

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
    """raw sha256 of (complete reference, b" ", platform, and owner and b" " before where several share the domain) ->
    ImageRecord as a msgpack map."""
    grants: _Database
    """raw sha256 of owner, then of (repository, b" ", blob digest) -> GrantRecord as a msgpack map."""


def _decode_hook(kind: type, value: object) -> object:
    if kind is Digest:
        return Digest(str(value))
    raise NotImplementedError(kind)


_encode = msgspec.msgpack.Encoder(enc_hook=str).encode
_decode_layer = msgspec.msgpack.Decoder(LayerRecord, dec_hook=_decode_hook).decode
_decode_map = msgspec.msgpack.Decoder(MapRecord, dec_hook=_decode_hook).decode
_decode_grant = msgspec.msgpack.Decoder(GrantRecord, dec_hook=_decode_hook).decode
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
            return DomainIndex(environment, path, databases, salt, SealedRecords(key, salt) if key else PlainRecords())
        except BaseException:
            environment.close()
            raise


def _open_databases(
    environment: lmdb.Environment, path: str, key: DomainKey | None, *, readonly: bool
) -> tuple[_Databases, bytes]:
    environment.reader_check()
    if not readonly:
        _make_databases(environment, path, key)
    databases = _databases_of(environment)
    with environment.begin(db=databases.about) as txn:
        _check_about(txn, databases.about, path, key)
        return databases, txn.get(b"salt") or b""


def _make_databases(environment: lmdb.Environment, path: str, key: DomainKey | None) -> None:
    """What is missing, in one transaction: each that makes something waits for the disk. Nothing in a newer format."""
    with environment.begin(write=True) as txn:
        about = environment.open_db(b"about", txn)
        if not _check_about(txn, about, path, key):
            txn.put(b"version", str(_version(key)).encode(), db=about)
            txn.put(b"salt", os.urandom(SALT_SIZE) if key else b"", db=about)
        for name in _Databases._fields:
            environment.open_db(name.encode(), txn)


def _check_about(txn: _Transaction, about: _Database, path: str, key: DomainKey | None) -> bool:
    """Whether there is a version; raises where it is not ours."""
    found = txn.get(b"version", db=about)
    if found is not None:
        _check_version(found, path, key)
    return found is not None


def _databases_of(environment: lmdb.Environment) -> _Databases:
    return _Databases(*(environment.open_db(name.encode(), create=False) for name in _Databases._fields))


class DomainIndex:
    """An open `index.lmdb`. `close` it, or use it as a context manager.

    LMDB refuses an environment in which the disk failed in the middle of a commit. It is then opened anew, at the next
    call that can, and says what was durable before.
    """

    def __init__(
        self, environment: lmdb.Environment, path: str, databases: _Databases, salt: bytes, records: Records
    ) -> None:
        self.salt = salt
        """What makes keystreams over its addresses its own; empty where the domain has no key."""
        self._environment = environment
        self._path = path
        self._db = databases
        self._records = records
        self._opening = threading.Lock()
        self._is_usable = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the environment; nothing is lost, as every commit was synced."""
        self._environment.close()

    @contextmanager
    def _transaction(self, database: _Database, *, write: bool = False) -> Iterator[_Transaction]:
        with mapped_errors(_NAME, self._path), self._begin(database, write=write) as txn:
            yield txn

    def _begin(self, database: _Database, *, write: bool) -> _Transaction:
        known = self._db
        if self._is_usable:
            try:
                return self._environment.begin(db=database, write=write)
            except lmdb.PanicError:
                self._is_usable = False
        with self._opening:
            if not self._is_usable:
                self._environment.close()
                self._environment = _open_environment(self._path, readonly=False)
                self._db = _databases_of(self._environment)
                self._is_usable = True
        return self._environment.begin(db=self._db[known.index(database)], write=write)

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
        return self.contents_of([digest]).get(digest)

    def contents_of(self, digests: Iterable[bytes]) -> dict[bytes, Extent]:
        """The extents of those of `digests` (BLAKE3) that the domain has, in one transaction."""
        wanted = list(digests)
        hidden = dict(zip(self._hide(b"".join(wanted), _DIGEST), wanted, strict=True))
        with self._transaction(self._db.by_content) as txn:
            found = txn.cursor().getmulti(sorted(hidden))
        extents = self._shown([value for _, value in found])
        return {hidden[key]: extent for (key, _), extent in zip(found, extents, strict=True)}

    def _hide(self, values: bytes, size: int) -> list[bytes]:
        """Values of `size` bytes each, one behind another, as they are kept."""
        hidden = self._records.hide(values)
        return [hidden[at : at + size] for at in range(0, len(hidden), size)]

    def _shown(self, values: Sequence[bytes]) -> list[Extent]:
        return [Extent(*numbers) for numbers in _EXTENT.iter_unpack(self._records.show(b"".join(values)))]

    # Layers

    def commit_layer(
        self, record: LayerRecord, new_contents: list[tuple[bytes, int, int]], drawn: MapRecord | None = None
    ) -> dict[int, int]:
        """Store a layer, its map, and the contents that came with it: (BLAKE3, address, size) each, in one transaction.

        Of contents that were registered meanwhile the earlier extent stands: returns its address by the address given
        here. The caller uses that one instead, and evicts its own copy; the map, which has others, is not stored.
        """
        check_key(record.key)
        with self._transaction(self._db.layers, write=True) as txn:
            replaced = self._put_contents(txn, new_contents)
            for slab in record.slabs:
                txn.put(_ADDRESS.pack(slab.address), _SLAB.pack(slab.size, 1), db=self._db.slabs)
            self._put(txn, _layer_key(record.key), _encode(record))
            if drawn is not None and not replaced:
                self._put(txn, drawn.id.encode(), _encode(drawn), database=self._db.maps)
        return replaced

    def _put_contents(self, txn: _Transaction, contents: list[tuple[bytes, int, int]]) -> dict[int, int]:
        contents = sorted(contents, key=lambda content: content[1])
        keys = self._hide(b"".join(digest for digest, _, _ in contents), _DIGEST)
        values = self._hide(b"".join(_EXTENT.pack(address, size) for _, address, size in contents), _EXTENT.size)
        cursor = txn.cursor(db=self._db.by_content)
        _, added = cursor.putmulti(sorted(zip(keys, values, strict=True), key=itemgetter(0)), overwrite=False)
        if added == len(contents):
            return {}
        found = cursor.getmulti(sorted(keys))
        extents = dict(zip((key for key, _ in found), self._shown([value for _, value in found]), strict=True))
        pairs = ((address, extents[key].address) for key, (_, address, _) in zip(keys, contents, strict=True))
        return {address: earlier for address, earlier in pairs if earlier != address}

    def _put(
        self, txn: _Transaction, name: bytes, value: bytes, suffix: bytes = b"", database: _Database | None = None
    ) -> None:
        """Keep a record in a database, or in the transaction's."""
        kept = self._records.name(name, suffix)
        txn.put(kept, self._records.seal(kept, value), db=database)

    def _get(self, txn: _Transaction, name: bytes) -> bytes | None:
        """What `_put` kept."""
        kept = self._records.name(name)
        value = txn.get(kept)
        return None if value is None else self._records.unseal(kept, value)

    def update_layer(self, key: LayerKey, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        """Replace a layer's record by what `change` makes of it, in one transaction; raises NotFoundError."""
        with self._transaction(self._db.layers, write=True) as txn:
            value = self._get(txn, _layer_key(key))
            if value is None:
                raise NotFoundError(f"no such layer: {key.blob} ({key.index})")
            record = change(_decode_layer(value))
            self._put(txn, _layer_key(key), _encode(record))
        return record

    def touch(self, keys: Collection[LayerKey], used: float) -> None:
        """Note, in one transaction, that layers were used at a time; seconds since the epoch."""
        with self._transaction(self._db.layers, write=True) as txn:
            for key in keys:
                value = self._get(txn, _layer_key(key))
                if value is not None:
                    record = msgspec.structs.replace(self._decoded(value, _decode_layer), last_used=used)
                    self._put(txn, _layer_key(key), _encode(record))

    def layer(self, key: LayerKey) -> LayerRecord | None:
        """The record of a layer, if its index is complete."""
        with self._transaction(self._db.layers) as txn:
            value = self._get(txn, _layer_key(key))
        return None if value is None else self._decoded(value, _decode_layer)

    def layers(self) -> list[LayerRecord]:
        """All layers, by blob digest."""
        with self._transaction(self._db.layers) as txn:
            values = [self._records.unseal(name, value) for name, value in txn.cursor()]
        return sorted((self._decoded(value, _decode_layer) for value in values), key=lambda record: record.key)

    # Maps, and where blobs come from

    def map(self, map_id: str) -> MapRecord | None:
        """The record of a map."""
        with self._transaction(self._db.maps) as txn:
            value = self._get(txn, map_id.encode())
        return None if value is None else self._decoded(value, _decode_map)

    def put_map(self, record: MapRecord) -> None:
        """Store the record of a map."""
        with self._transaction(self._db.maps, write=True) as txn:
            self._put(txn, record.id.encode(), _encode(record))

    def origins(self, blob: Digest, access: Access) -> list[tuple[str, str]]:
        """The repositories that are known to have a blob, the latest first, each with whose knowledge that is.

        Where several share the domain, and no owner is named, those that any of them knows.
        """
        place, owner = _origin_key(blob, access)
        first = self._records.name(place, owner)
        with self._transaction(self._db.origins) as txn:
            if not access.origin or access.owner:
                found = [(first, txn.get(first))]
            else:
                cursor = txn.cursor()
                cursor.set_range(first)
                found = list(takewhile(lambda pair: pair[0].startswith(first), cursor))
        lists = [(kept, self._records.unseal(kept, value)) for kept, value in found if value]
        return [
            (access.owner or self._records.suffix(place, kept).decode(), name)
            for kept, value in lists
            for name in self._decoded(value, _decode_names)
        ]

    def put_origin(self, blobs: Collection[Digest], repository: str, access: Access) -> None:
        """Remember that a repository has these blobs; the latest few of each are kept. Writes only what is new."""
        known = {blob: [name for _, name in self.origins(blob, access)] for blob in blobs}
        fresh = {blob: names for blob, names in known.items() if names[:1] != [repository]}
        if fresh:
            with self._transaction(self._db.origins, write=True) as txn:
                for blob, names in fresh.items():
                    latest = [repository, *(name for name in names if name != repository)]
                    place, owner = _origin_key(blob, access)
                    self._put(txn, place, _encode(latest[:_ORIGINS]), owner)

    def grant(self, owner: str, repository: str, blob: Digest) -> GrantRecord | None:
        """A grant, whether it still holds or not."""
        kept = self._records.name(_owner_key(owner), _grant_key(repository, blob))
        with self._transaction(self._db.grants) as txn:
            value = txn.get(kept)
        return None if value is None else self._decoded(self._records.unseal(kept, value), _decode_grant)

    def put_grant(self, record: GrantRecord) -> None:
        """Keep a grant."""
        with self._transaction(self._db.grants, write=True) as txn:
            self._put(txn, _owner_key(record.owner), _encode(record), _grant_key(record.repository, record.blob))

    def delete_grant(self, owner: str, repository: str, blob: Digest) -> None:
        """Forget a grant, if there is one."""
        with self._transaction(self._db.grants, write=True) as txn:
            txn.delete(self._records.name(_owner_key(owner), _grant_key(repository, blob)))

    def all_grants(self) -> list[GrantRecord]:
        """Those of every owner."""
        with self._transaction(self._db.grants) as txn:
            pairs = list(txn.cursor())
        return [self._decoded(self._records.unseal(kept, value), _decode_grant) for kept, value in pairs]

    def delete_grants(self, owner: str) -> int:
        """Forget all grants of an owner; how many there were."""
        with self._transaction(self._db.grants, write=True) as txn:
            first = self._records.name(_owner_key(owner))
            cursor = txn.cursor()
            cursor.set_range(first)
            keys = [key for key, _ in takewhile(lambda pair: pair[0].startswith(first), cursor)]
            for key in keys:
                txn.delete(key)
        return len(keys)

    def image(self, key: str) -> ImageRecord | None:
        """What an image was when it was last resolved; `key` is its complete reference, a space and its platform."""
        with self._transaction(self._db.images) as txn:
            value = self._get(txn, _image_key(key))
        return None if value is None else self._decoded(value, _decode_image)

    def put_image(self, key: str, record: ImageRecord) -> None:
        """Remember an image. Writes only what is new."""
        if self.image(key) != record:
            with self._transaction(self._db.images, write=True) as txn:
                self._put(txn, _image_key(key), _encode(record))

    def images(self) -> list[ImageRecord]:
        """All images, pins included; one that was resolved under two names is there twice."""
        with self._transaction(self._db.images) as txn:
            values = [self._records.unseal(name, value) for name, value in txn.cursor()]
        return [self._decoded(value, _decode_image) for value in values]

    def drop_image(self, key: str) -> None:
        """Forget what `put_image` remembered under `key`, if anything."""
        with self._transaction(self._db.images, write=True) as txn:
            txn.delete(self._records.name(_image_key(key)))

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


def _owner_key(owner: str) -> bytes:
    """Of one length, so that no owner's begins another's."""
    return hashlib.sha256(owner.encode()).digest()


def _grant_key(repository: str, blob: Digest) -> bytes:
    return hashlib.sha256(f"{repository} {blob}".encode()).digest()


def _image_key(key: str) -> bytes:
    """LMDB's keys end at 511 bytes, the directory of a layout does not."""
    return hashlib.sha256(key.encode()).digest()


def _origin_key(blob: Digest, access: Access) -> tuple[bytes, bytes]:
    """What the name of who knows where a blob is begins with, and ends with."""
    return (f"{blob} {access.origin} ".encode(), access.owner.encode()) if access.origin else (blob.encode(), b"")


def _layer_key(key: LayerKey) -> bytes:
    return f"{key.blob}/{key.index}{'@' + key.origin if key.origin else ''}".encode()
