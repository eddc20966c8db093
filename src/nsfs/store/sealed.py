"""Files and records under the key of their domain; plain ones where it has none.

Owns the format of a sealed file: a header with 32 random bytes, which are the salt of its keystream, and ciphertext
behind it, as long as the plaintext. So a file that is written anew has another keystream, and any part can be read
alone. And the shape of sealed records: authenticated, each with a nonce of its own, bound to where it belongs; names
and fixed small values are permuted by the key instead, since they are looked up.

Refuses files and records that are not under the key, or plain where it should be. Any thread. What is loaded stays
open, and is read, not mapped: where the disk fails that is an error of one read, and no signal (SIGBUS) that ends all.
"""

from __future__ import annotations

import os
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV

from nsfs.errors import CorruptError, NotFoundError, UnsupportedError
from nsfs.store.crypt import UNIT
from nsfs.store.files import replace_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nsfs.store.crypt import DomainKey, Keystream
    from nsfs.store.files import Pieces

VERSION: Final = 1
"""Of the format of sealed files."""

_HEADER: Final = struct.Struct("<8sI20x32s")
"""Magic, version, zeros, salt."""
_MAGIC: Final = b"nsfsseal"
_SALT: Final = 32
_NONCE: Final = 12
_NAME: Final = 32
HEADER_SIZE: Final = _HEADER.size


# Files


class _File:
    """An open file."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._fd = -1
            raise NotFoundError(f"there is no such file: {path}: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, start: int, stop: int) -> bytes:
        """What lies there; raises CorruptError."""
        pieces = []
        while start < stop:
            try:
                piece = os.pread(self._fd, stop - start, start)
            except OSError as error:
                raise CorruptError(f"the file cannot be read: {self.path}: {error.strerror}") from error
            if not piece:
                raise CorruptError(f"the file ends early: {self.path}")
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Content:
    """What a file says, read slice by slice, and decrypted where it is sealed; it stays as it was opened.

    A slice raises CorruptError where the disk fails.
    """

    def __init__(self, file: _File, stream: Keystream | None, start: int, stop: int) -> None:
        self._file = file
        self._stream = stream
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice, /) -> bytes:
        low, high, _ = part.indices(len(self))
        low, high = self._start + low, self._start + max(low, high)
        if self._stream is None:
            return self._file.read(low, high)
        sealed = self._file.read(HEADER_SIZE + low // UNIT * UNIT, HEADER_SIZE + high)
        return apply_at(self._stream, low, sealed)

    def part(self, start: int, stop: int) -> Content:
        """A slice, of which nothing is read yet."""
        return Content(self._file, self._stream, self._start + start, self._start + stop)


def apply_at(stream: Keystream, offset: int, data: bytes | memoryview) -> bytes:
    """`data`, which begins at the unit of the keystream that has `offset`, decrypted from `offset` on."""
    return stream.apply(offset // UNIT * UNIT, data)[offset % UNIT :]


def load_content(path: str, key: DomainKey | None) -> Content:
    """A file of a domain. Raises NotFoundError, CorruptError, UnsupportedError."""
    file = _File(path)
    if key is None:
        return Content(file, None, 0, file.size)
    stream = open_stream(file.read(0, min(HEADER_SIZE, file.size)), key, path)
    return Content(file, stream, 0, file.size - HEADER_SIZE)


def make_header() -> bytes:
    """The beginning of a new sealed file."""
    return _HEADER.pack(_MAGIC, VERSION, os.urandom(_SALT))


def open_stream(header: bytes, key: DomainKey, path: str) -> Keystream:
    """The keystream of the sealed file that begins with `header`; raises CorruptError, UnsupportedError."""
    if len(header) < HEADER_SIZE or header[:8] != _MAGIC:
        raise CorruptError(f"the file is not under the key of its domain: {path}")
    _, version, salt = _HEADER.unpack(header)
    if version > VERSION:
        raise UnsupportedError(
            f"the file is sealed in a newer format: {path}: {version}",
            hint=f"this nsfs reads format {VERSION}; use the release that wrote it",
        )
    return key.keystream("file", salt)


def store_files(files: Mapping[str, Pieces], key: DomainKey | None) -> None:
    """Write files as `replace_files` does, under the key if there is one; raises NoSpaceError."""
    replace_files({path: pieces if key is None else _sealed(pieces, key, path) for path, pieces in files.items()})


def _sealed(pieces: Pieces, key: DomainKey, path: str) -> Iterator[bytes]:
    header = make_header()
    yield header
    stream, at = open_stream(header, key, path), 0
    for piece in pieces:
        yield encrypt_at(stream, at, piece)
        at += len(piece)


def encrypt_at(stream: Keystream, offset: int, data: bytes | bytearray | memoryview) -> bytes:
    """`data` as it belongs at any `offset`."""
    skip = offset % UNIT
    return stream.apply(offset - skip, b"".join((bytes(skip), data)) if skip else data)[skip:]


# Records


class Records(Protocol):
    """How an index keeps what it is told."""

    def name(self, name: bytes, suffix: bytes = b"") -> bytes:
        """What `name` and then `suffix` is looked up by; it begins with what `name` alone gives."""

    def suffix(self, name: bytes, kept: bytes) -> bytes:
        """The suffix with which `name` gave `kept`."""

    def seal(self, kept: bytes, value: bytes) -> bytes:
        """`value`, to be kept under what `name` gave."""

    def unseal(self, kept: bytes, value: bytes) -> bytes:
        """What was kept there."""

    def hide(self, values: bytes) -> bytes:
        """Values of 16 bytes or multiples, one behind another, none of whose 16 bytes ever occur twice."""

    def show(self, values: bytes) -> bytes:
        """What `hide` hid."""


class PlainRecords:
    """As they are."""

    def name(self, name: bytes, suffix: bytes = b"") -> bytes:
        """See Records."""
        return name + suffix

    def suffix(self, name: bytes, kept: bytes) -> bytes:
        """See Records."""
        return kept[len(name) :]

    def seal(self, kept: bytes, value: bytes) -> bytes:  # noqa: ARG002
        """See Records."""
        return value

    def unseal(self, kept: bytes, value: bytes) -> bytes:  # noqa: ARG002
        """See Records."""
        return value

    def hide(self, values: bytes) -> bytes:
        """See Records."""
        return values

    def show(self, values: bytes) -> bytes:
        """See Records."""
        return values


class SealedRecords:
    """Under a key: AES-256-GCM (NIST SP 800-38D) with random nonces for what is read by name, which is a keyed hash.

    What is looked for by the beginning of its name has the rest behind that hash, by AES-SIV (RFC 5297).

    A write of each record of the largest domain, once a second for a hundred years, makes fewer than the 2^32 nonces
    that one key may have. Values of whole blocks that never occur twice, such as digests, are blocks of AES by
    themselves: equal ones could be told, and there are none.
    """

    def __init__(self, key: DomainKey, salt: bytes) -> None:
        self._names = key.derive("record names", salt)
        self._suffixes = AESSIV(key.derive("record suffixes", salt, 64))
        self._aead = AESGCM(key.derive("records", salt))
        self._blocks = Cipher(algorithms.AES(key.derive("blocks", salt)), modes.ECB())  # noqa: S305  see above

    def name(self, name: bytes, suffix: bytes = b"") -> bytes:
        """See Records."""
        hidden = self._suffixes.encrypt(suffix, [name]) if suffix else b""
        return blake2b(name, key=self._names, digest_size=_NAME).digest() + hidden

    def suffix(self, name: bytes, kept: bytes) -> bytes:
        """See Records."""
        return self._suffixes.decrypt(kept[_NAME:], [name]) if len(kept) > _NAME else b""

    def seal(self, kept: bytes, value: bytes) -> bytes:
        """See Records."""
        nonce = os.urandom(_NONCE)
        return nonce + self._aead.encrypt(nonce, value, kept)

    def unseal(self, kept: bytes, value: bytes) -> bytes:
        """See Records; raises CorruptError."""
        try:
            return self._aead.decrypt(value[:_NONCE], value[_NONCE:], kept)
        except (InvalidTag, ValueError):
            raise CorruptError("a record is not under the key of its domain, or was changed") from None

    def hide(self, values: bytes) -> bytes:
        """See Records."""
        return self._blocks.encryptor().update(values)

    def show(self, values: bytes) -> bytes:
        """See Records."""
        return self._blocks.decryptor().update(values)
