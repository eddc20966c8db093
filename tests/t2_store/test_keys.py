"""Keys in files, and domains that begin, go on and are deleted with them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from nsfs.errors import CorruptError, DeniedError, NotFoundError, UnsupportedError
from nsfs.model.encryption import Encrypt, KeyPlace, plan_key
from nsfs.store.crypt import DomainKey, load_key
from nsfs.store.domains import Domains
from nsfs.store.index import open_index
from nsfs.store.keys import Keys, load_host_key
from nsfs.store.layout import Layout
from nsfs.store.pool import open_pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nsfs.store.pool import Pool

HOST_KEY = bytes(range(100, 140))
NAME = "ns/team-a"
BASE = 1 << 30
SECRET = b"the block that nobody else reads".ljust(4096, b".")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "root"), str(tmp_path / "run"))


def domains(layout: Layout, encrypt: Encrypt = Encrypt.ISOLATED, host_key: bytes | None = None) -> Domains:
    return Domains(layout, Keys(layout, host_key), encrypt)


@contextmanager
def opened(store: Domains, layout: Layout, name: str = NAME) -> Iterator[Pool]:
    """The pool of a domain, as its worker opens it."""
    bitmap, key = store.open(name)
    try:
        domain = layout.domain(name, load_key(key))
        with open_index(domain.index, domain.key) as index:
            pool = open_pool(domain, bitmap, index.salt)
        yield pool
        pool.flush()
        pool.close()
    finally:
        os.close(bitmap)
        os.close(key)


def on_disk(layout: Layout, name: str = NAME) -> bytes:
    with open(layout.domain(name).disk, "rb") as file:
        file.seek(BASE)
        return file.read(4096)


def contents(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("domain", "places"),
    [
        ("shared", [KeyPlace.NOWHERE, KeyPlace.DISK]),
        ("ns/team-a", [KeyPlace.DISK, KeyPlace.DISK]),
        ("ns/pod", [KeyPlace.DISK, KeyPlace.DISK]),
        ("pod/0a1b", [KeyPlace.MEMORY, KeyPlace.MEMORY]),
    ],
)
def test_who_has_a_key_and_where(domain: str, places: list[KeyPlace]) -> None:
    assert [plan_key(domain, encrypt) for encrypt in (Encrypt.ISOLATED, Encrypt.ALL)] == places
    assert plan_key(domain, Encrypt.OFF) is KeyPlace.NOWHERE


@pytest.mark.parametrize("host_key", [None, HOST_KEY])
def test_a_domain_is_under_its_key_and_found_again(layout: Layout, host_key: bytes | None) -> None:
    for _ in range(2):
        with opened(domains(layout, host_key=host_key), layout) as pool:
            assert pool.read_present(BASE, 4096) in (None, SECRET)
            pool.write(BASE, SECRET)
    assert on_disk(layout) != SECRET
    path = layout.key(NAME)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(layout.keys).st_mode & 0o777 == 0o700
    key = Keys(layout, host_key).load(NAME)
    assert key is not None
    assert (key.secret in contents(path)) == (host_key is None)


def test_shared_domains_are_plain_unless_all_are_encrypted(layout: Layout) -> None:
    for name, encrypt in (("shared", Encrypt.ISOLATED), ("ns/open", Encrypt.OFF)):
        with opened(domains(layout, encrypt), layout, name) as pool:
            pool.write(BASE, SECRET)
        assert on_disk(layout, name) == SECRET
    with opened(domains(layout, Encrypt.ALL), layout, "public") as pool:
        pool.write(BASE, SECRET)
    assert on_disk(layout, "public") != SECRET
    assert os.listdir(layout.keys) == ["public"]


def test_what_was_begun_stays_as_it_is(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    for name, first, then in (("ns/old", Encrypt.OFF, Encrypt.ALL), ("ns/new", Encrypt.ALL, Encrypt.OFF)):
        with opened(domains(layout, first), layout, name) as pool:
            pool.write(BASE, SECRET)
        with opened(domains(layout, then), layout, name) as pool:
            assert pool.read_present(BASE, 4096) == SECRET
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "domain ns/old was begun without a key"
    ]


@pytest.mark.parametrize("other", [None, b"another secret of the host's, as long"])
def test_without_the_hosts_key_nothing_is_opened_or_dropped(layout: Layout, other: bytes | None) -> None:
    with opened(domains(layout, host_key=HOST_KEY), layout) as pool:
        pool.write(BASE, SECRET)
    store = domains(layout, host_key=other)
    store.drop_lost(())
    with pytest.raises(DeniedError, match=NAME):
        store.open(NAME)
    with opened(domains(layout, host_key=HOST_KEY), layout) as pool:
        assert pool.read_present(BASE, 4096) == SECRET


def test_a_key_of_another_domain_is_no_key(layout: Layout) -> None:
    store = domains(layout, host_key=HOST_KEY)
    for name in (NAME, "ns/team-b"):
        with opened(store, layout, name):
            pass
    os.replace(layout.key("ns/team-b"), layout.key(NAME))
    with pytest.raises(DeniedError, match="wrapped by another key file"):
        store.open(NAME)


def test_another_key_is_refused_and_gives_no_garbage(layout: Layout) -> None:
    store = domains(layout)
    with opened(store, layout) as pool:
        pool.write(BASE, SECRET)
    Keys(layout, None).destroy(NAME)
    stranger = Keys(layout, None)
    stranger._store(NAME, DomainKey.generate())
    with pytest.raises(DeniedError, match="not the one"):
        store.open(NAME)


def test_a_plain_key_is_wrapped_when_the_host_gets_one(layout: Layout) -> None:
    with opened(domains(layout), layout) as pool:
        pool.write(BASE, SECRET)
    plain = contents(layout.key(NAME))
    with open(layout.key(NAME), "rb") as before:
        with opened(domains(layout, host_key=HOST_KEY), layout) as pool:
            assert pool.read_present(BASE, 4096) == SECRET
        assert before.read() == bytes(len(plain)), "its bytes are overwritten where they lie"
    assert plain[16:48] not in contents(layout.key(NAME))
    with opened(domains(layout, host_key=HOST_KEY), layout) as pool:
        assert pool.read_present(BASE, 4096) == SECRET


def test_deleting_destroys_the_key_and_all_of_the_domain(layout: Layout) -> None:
    store = domains(layout)
    with opened(store, layout) as pool:
        pool.write(BASE, SECRET)
    with open(layout.key(NAME), "rb") as key:
        length = os.fstat(key.fileno()).st_size
        store.delete(NAME)
        assert key.read() == bytes(length)
    assert os.listdir(layout.keys) == os.listdir(layout.domains) == []
    store.delete(NAME)
    with opened(store, layout) as pool:
        assert pool.read_present(BASE, 4096) is None


def test_an_interrupted_deletion_is_finished_and_nothing_else_goes(layout: Layout) -> None:
    store = domains(layout)
    for name in (NAME, "ns/other", "pod/0a1b"):
        with opened(store, layout, name):
            pass
    with opened(domains(layout, Encrypt.OFF), layout, "ns/plain"):
        pass
    store.destroy_key(NAME)
    domains(layout).drop_lost(())
    assert sorted(os.listdir(layout.domains)) == ["ns%2Fother", "ns%2Fplain"]


def test_the_key_of_a_pod_is_in_no_file(layout: Layout) -> None:
    with opened(domains(layout), layout, "pod/0a1b") as pool:
        pool.write(BASE, SECRET)
    assert on_disk(layout, "pod/0a1b") != SECRET
    assert not os.path.exists(layout.keys)
    with opened(domains(layout), layout, "pod/0a1b") as pool:
        assert pool.read_present(BASE, 4096) is None


def test_the_hosts_key_comes_from_the_configuration_or_from_systemd(tmp_path: Path) -> None:
    (tmp_path / "nsfs.key").write_bytes(HOST_KEY)
    (tmp_path / "short").write_bytes(bytes(31))
    assert load_host_key(str(tmp_path / "nsfs.key"), "") == HOST_KEY
    assert load_host_key("", str(tmp_path)) == HOST_KEY
    assert load_host_key("", str(tmp_path / "none")) is None
    assert load_host_key("", "") is None
    with pytest.raises(CorruptError, match="less than 32 bytes"):
        load_host_key(str(tmp_path / "short"), "")
    with pytest.raises(NotFoundError):
        load_host_key(str(tmp_path / "missing"), str(tmp_path))


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"", CorruptError), (b"nsfskey\0\2".ljust(8192, b"\0"), UnsupportedError), (b"x" * 8192, CorruptError)],
)
def test_a_damaged_key_is_said_to_be_one(layout: Layout, data: bytes, error: type[Exception]) -> None:
    with opened(domains(layout), layout):
        pass
    with open(layout.key(NAME), "wb") as file:
        file.write(data)
    with pytest.raises(error, match=NAME):
        domains(layout).open(NAME)
