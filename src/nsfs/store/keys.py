"""Keys of domains on disk: who has one, where it lies, and how it is destroyed.

Owns the files in `keys`, one per encrypted domain, readable by the daemon's user alone, wrapped by the host's key where
there is one (RFC 3394, AES key wrap, by a key derived for that domain). A pod's key is never in a file. Refuses a key
that it cannot unwrap: a domain under a key that is merely not to be had now is not dropped.

What there is stays as it is: a domain with a key is encrypted, one that was begun without stays plain, and the
configuration decides about new ones. Invariants: a domain's key is on disk, synced, before anything is under it; a key
is destroyed before its domain is deleted, so what an interruption leaves is noise, which the next start deletes.

Concurrency: blocks for syncs, call it in a thread; one daemon owns `keys`.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from nsfs.errors import CorruptError, DeniedError, NotFoundError, UnsupportedError
from nsfs.store.crypt import KEY_SIZE, DomainKey
from nsfs.store.files import overwrite, replace_files, sync_directory
from nsfs.store.poolfiles import is_encrypted

if TYPE_CHECKING:
    from nsfs.store.layout import Layout

VERSION: Final = 1
"""Of the format of a key's file."""

CREDENTIAL: Final = "nsfs.key"
"""Name of the host's key among systemd's credentials (systemd.exec(5), LoadCredentialEncrypted=)."""

_HEADER: Final = struct.Struct("<8sII")
"""Magic, version, whether what follows is wrapped."""
_MAGIC: Final = b"nsfskey\0"
_FILE: Final = 8192
"""Bytes of a key's file: too many to be kept beside its inode, where overwriting it would leave copies in a journal."""
_WRAPPED: Final = KEY_SIZE + 8
_LEAST: Final = 32
_MOST: Final = 1 << 20


def load_host_key(path: str, credentials: str) -> bytes | None:
    """What wraps the keys of domains: of the file at `path`, else of the directory `credentials`, else None.

    Raises NotFoundError, DeniedError, CorruptError (it has not at least 32 bytes).
    """
    if not path:
        path = os.path.join(credentials, CREDENTIAL) if credentials else ""
        if not os.path.exists(path):
            return None
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST)
    except FileNotFoundError:
        raise NotFoundError(f"no such key file: {path}") from None
    except OSError as error:
        raise DeniedError(f"the key file is not readable: {path}: {error.strerror}") from None
    if len(data) < _LEAST:
        raise CorruptError(
            f"the key file has less than {_LEAST} bytes: {path}", hint="dd if=/dev/urandom of=FILE bs=32 count=1"
        )
    return data


class Keys:
    """The keys of one daemon's domains."""

    def __init__(self, layout: Layout, host_key: bytes | None) -> None:
        self._layout = layout
        self._host_key = host_key

    def load(self, domain: str) -> DomainKey | None:
        """The key of a domain that has one; raises DeniedError, CorruptError, UnsupportedError."""
        path = self._layout.key(domain)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        secret, is_wrapped = self._unpack(domain, data)
        key = DomainKey(secret)
        if not is_wrapped and self._host_key is not None:
            self._wrap_late(domain, key)
        return key

    def ensure(self, domain: str, *, wanted: bool) -> DomainKey | None:
        """The key of a domain; a new one for a domain that begins now and is `wanted` encrypted."""
        key = self.load(domain)
        domain_layout = self._layout.domain(domain)
        if key is not None or not wanted or any(map(os.path.exists, (domain_layout.disk, domain_layout.index))):
            return key
        key = DomainKey.generate()
        self._store(domain, key)
        return key

    def destroy(self, domain: str) -> None:
        """Overwrite and delete the key of a domain, durably; nothing happens where it has none."""
        path = self._layout.key(domain)
        with suppress(FileNotFoundError):
            with open(path, "r+b", buffering=0) as file:
                overwrite(file.fileno())
            os.unlink(path)
            sync_directory(self._layout.keys)

    def is_lost(self, domain: str) -> bool:
        """Whether a domain is encrypted and its key is gone: its deletion was interrupted."""
        return not os.path.exists(self._layout.key(domain)) and is_encrypted(self._layout.domain(domain))

    def _wrap_late(self, domain: str, key: DomainKey) -> None:
        """Replace a file from before there was a host's key; its bytes are overwritten once they are not needed."""
        with open(self._layout.key(domain), "r+b", buffering=0) as plain:
            self._store(domain, key)
            overwrite(plain.fileno())

    def _store(self, domain: str, key: DomainKey) -> None:
        os.makedirs(self._layout.keys, 0o700, exist_ok=True)
        replace_files({self._layout.key(domain): [self._pack(domain, key).ljust(_FILE, b"\0")]})

    def _pack(self, domain: str, key: DomainKey) -> bytes:
        if self._host_key is None:
            return _HEADER.pack(_MAGIC, VERSION, 0) + key.secret
        return _HEADER.pack(_MAGIC, VERSION, 1) + aes_key_wrap(_wrapping_key(self._host_key, domain), key.secret)

    def _unpack(self, domain: str, data: bytes) -> tuple[bytes, bool]:
        if len(data) < _HEADER.size or data[:8] != _MAGIC:
            raise CorruptError(f"the key of domain {domain} is damaged")
        _, version, wrapped = _HEADER.unpack_from(data)
        if version > VERSION:
            raise UnsupportedError(
                f"the key of domain {domain} has a newer format: {self._layout.key(domain)}: {version}",
                hint=f"this nsfs reads format {VERSION}; use the release that wrote it",
            )
        if len(data) != _FILE:
            raise CorruptError(f"the key of domain {domain} is damaged")
        if wrapped:
            return self._unwrap(domain, data[_HEADER.size : _HEADER.size + _WRAPPED]), True
        return data[_HEADER.size : _HEADER.size + KEY_SIZE], False

    def _unwrap(self, domain: str, wrapped: bytes) -> bytes:
        if self._host_key is None:
            raise DeniedError(
                f"the key of domain {domain} is wrapped, and nothing here unwraps it",
                hint="set key_file, or give the daemon its credential",
            )
        try:
            return aes_key_unwrap(_wrapping_key(self._host_key, domain), wrapped)
        except InvalidUnwrap:
            raise DeniedError(
                f"the key of domain {domain} was wrapped by another key file, or is damaged",
                hint="with the right one back all goes on; deleting the domain drops what it has",
            ) from None


def _wrapping_key(host_key: bytes, domain: str) -> bytes:
    return HKDF(SHA256(), 32, None, b"nsfs key of " + domain.encode()).derive(host_key)
