"""Keystreams and keys: any part alone, and nothing under another key."""

from __future__ import annotations

import os
import threading

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

import once
from nsfs.errors import CorruptError
from nsfs.store.crypt import BLOCK, PIECE, ROOM, DomainKey, load_key, make_key_file

KEY = DomainKey(bytes(range(32)))
SALT = b"sixteen bytes of"
PLAIN = b"".join(b"block %10d" % number for number in range(4096))
BASE = 9 << 40


class Disk:
    """What is stored from BASE on."""

    def __init__(self) -> None:
        self.stored = bytearray()
        self._cipher = KEY.disk(SALT)

    def store(self, address: int, data: bytes) -> None:
        self._cipher.store(address, memoryview(data), self._write)

    def load(self, address: int, size: int) -> bytes:
        first, end = address // BLOCK * BLOCK, -(-(address + size) // BLOCK) * BLOCK
        plain = memoryview(bytearray(end - first + ROOM))
        self._cipher.load(first, plain, self._read)
        return bytes(plain[address - first :][:size])

    def _write(self, data: memoryview, address: int) -> None:
        self.stored[address - BASE : address - BASE + len(data)] = data

    def _read(self, buffer: memoryview, address: int) -> None:
        buffer[:] = self.stored[address - BASE :][: len(buffer)]


def at_once(offset: int, data: bytes) -> bytes:
    """The keystream as the standard has it: one counter of 128 bits, from the first byte on."""
    cipher = Cipher(algorithms.AES(KEY.derive("disk", SALT)), modes.CTR((offset // 16).to_bytes(16, "big")))
    return cipher.encryptor().update(data)


@given(first=st.integers(0, 4095), count=st.integers(0, 4096))
def test_any_part_of_a_keystream_is_as_in_the_whole(first: int, count: int) -> None:
    stream = KEY.keystream("disk", SALT)
    part = PLAIN[first * 16 : (first + count) * 16]
    assert stream.apply(BASE + first * 16, part) == at_once(BASE, PLAIN)[first * 16 : (first + count) * 16]
    assert stream.apply(BASE + first * 16, stream.apply(BASE + first * 16, part)) == part


def test_a_keystream_begins_at_units() -> None:
    with pytest.raises(ValueError, match="17"):
        KEY.keystream("disk", SALT).apply(17, b"x")


def test_threads_do_not_disturb_each_other() -> None:
    stream = KEY.keystream("disk", SALT)
    wrong: list[int] = []

    def work(start: int) -> None:
        offsets = range(start, start + (1 << 20), 1 << 16)
        wrong.extend(offset for offset in offsets if stream.apply(offset, PLAIN) != at_once(offset, PLAIN))

    threads = [threading.Thread(target=work, args=(number << 30,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=30)
@given(holes=st.sets(st.integers(0, 15)))
def test_blocks_that_were_never_written_are_zeros(holes: set[int]) -> None:
    disk = Disk()
    disk.store(BASE, PLAIN)
    wanted = bytearray(PLAIN)
    for number in holes:
        disk.stored[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
        wanted[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
    assert disk.load(BASE, len(PLAIN)) == wanted


@settings(max_examples=30)
@given(start=st.integers(0, 3 * PIECE - 1), size=st.integers(0, 3 * PIECE))
def test_any_part_of_a_disk(start: int, size: int) -> None:
    disk, data = Disk(), PLAIN * 24
    disk.store(BASE, data)
    assert disk.stored == at_once(BASE, data)
    assert disk.load(BASE + start, min(size, len(data) - start)) == data[start : start + size]


def test_a_block_that_only_begins_with_zeros_is_no_hole() -> None:
    disk = Disk()
    disk.stored = bytearray(bytes(64) + os.urandom(BLOCK - 64))
    before = bytes(disk.stored)
    disk.store(BASE, disk.load(BASE, BLOCK))
    assert disk.stored == before
    disk.store(BASE, bytes(BLOCK))
    assert disk.stored != bytes(BLOCK)
    assert disk.load(BASE, BLOCK) == bytes(BLOCK)


def test_what_is_derived_depends_on_key_purpose_and_salt() -> None:
    other = DomainKey.generate()
    seen = {key.derive(purpose, salt) for key in (KEY, other) for purpose in ("a", "b") for salt in (SALT, b"")}
    assert len(seen) == 8
    assert KEY.is_meant_by(KEY.check_value(SALT), SALT)
    assert not other.is_meant_by(KEY.check_value(SALT), SALT)
    with pytest.raises(ValueError, match="salt"):
        KEY.disk(b"")


def test_a_key_goes_to_another_process_by_a_descriptor() -> None:
    for key in (KEY, None):
        fd = make_key_file(key)
        found = [load_key(fd) for _ in range(2)]
        os.close(fd)
        assert [each and each.secret for each in found] == [key and key.secret] * 2
    with pytest.raises(CorruptError, match="31"):
        DomainKey(bytes(31))


def test_two_plaintexts_at_one_address_are_noticed() -> None:
    watch, disk = once.OnceCipher(bytes(32)), Disk()
    for _ in range(2):
        watch.store(BASE, memoryview(PLAIN), disk._write)
    with pytest.raises(AssertionError, match=str(BASE + BLOCK)):
        watch.store(BASE + BLOCK, memoryview(PLAIN)[:BLOCK], disk._write)
