"""Registries that fail by script, under real mounts: right bytes or a clear error, in bounded time."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from fakes import FakeRegistry
from images import Image, Layer, file, gzip_layer
from mounting import swept
from nsfs.model.pool import LayerKey
from nsfs.store.index import open_index
from nsfs_daemon import Daemon, run_daemon
from published import estargz_layer, publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LETTERS = "ETSCRAFLDWX"
"""See fakes.py: 5xx, stall, short, corrupt, range ignored, 401, 403, 429 by seconds and by date, wrong range, reset."""
SETTINGS = {"registry": {"read_timeout": "1s", "connect_timeout": "2s"}, "fetch": {"read_ahead": 0}}
BOUND = 120.0
"""Seconds in which everything here is over; a read timeout of 1 s and four attempts make some 6, on an idle machine."""
FOR_EVER = 10_000
PATIENCE = "wait:6s"
"""Of mounts: longer than one fault lasts."""

SUCCESS, DENIED, UNREACHABLE, CORRUPT = 0, 4, 5, 6


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon")), SETTINGS) as running:
        yield running


@dataclass(frozen=True)
class Case:
    """One fault at one registry of its own, with an image of its own."""

    letter: str
    registry: FakeRegistry
    reference: str
    files: dict[str, bytes]
    layer: Layer
    target: str

    def only_layer(self) -> None:
        """Let the script be about the layer's blob alone, and at the storage if there is one."""
        self.registry.faults_on = f"{'/storage/' if self.registry.redirect else ''}.*{self.layer.digest.hex}"


def files_of(seed: object, count: int = 8) -> dict[str, bytes]:
    """Files that none of has a span of its own, and no two the same."""
    return {f"d/{number}": random.Random(f"{seed} {number}").randbytes(700_000) for number in range(count)}


def plain(files: dict[str, bytes]) -> Layer:
    return gzip_layer([file(name, data) for name, data in files.items()], level=0)


def estargz(files: dict[str, bytes]) -> Layer:
    return estargz_layer([file(name, data) for name, data in files.items()], chunk_size=1 << 20)


def in_parallel(
    check: Callable[[Case], object], path: Path, stage: str, make: Callable[[dict[str, bytes]], Layer] = plain
) -> None:
    """Run `check` for every letter at once, and say of which it failed."""

    def run(letter: str) -> str:
        files = files_of(f"{stage} {letter}")
        layer = make(files)
        target = path / letter
        target.mkdir()
        with FakeRegistry(auth="token" if letter == "A" else None, redirect=letter == "F") as registry:
            name = f"{stage}/{letter.lower()}"
            case = Case(letter, registry, publish(registry, Image((layer,)), name), files, layer, str(target))
            begun = time.monotonic()
            try:
                check(case)
            except Exception as error:
                raise AssertionError(f"{stage} {letter}: {error!r}") from error
            finally:
                registry.script = ""
            assert time.monotonic() - begun < BOUND, letter
        return letter

    with swept(path), ThreadPoolExecutor(len(LETTERS)) as pool:
        assert "".join(pool.map(run, LETTERS)) == LETTERS


@contextlib.contextmanager
def mounted(daemon: Daemon, case: Case, *options: str) -> Iterator[str]:
    with daemon.mounted(case.reference, case.target, *options):
        yield case.target


def read(path: str) -> bytes:
    with open(path, "rb") as opened:
        return opened.read()


def test_one_fault_at_each_request_for_documents_harms_nobody(daemon: Daemon, tmp_path: Path) -> None:
    def check(case: Case) -> None:
        case.registry.faults_on = "/manifests/"
        case.registry.script = case.letter
        if case.letter == "F":
            expect_mount(daemon, case, DENIED)
        with mounted(daemon, case) as root:
            assert read(f"{root}/d/3") == case.files["d/3"]

    in_parallel(check, tmp_path, "document")


def test_documents_that_never_come_are_a_clear_error(daemon: Daemon, tmp_path: Path) -> None:
    expected = {"C": CORRUPT, "A": DENIED, "F": DENIED, "R": SUCCESS, "W": SUCCESS}

    def check(case: Case) -> None:
        case.registry.faults_on = "/manifests/"
        case.registry.script = case.letter * FOR_EVER
        expect_mount(daemon, case, expected.get(case.letter, UNREACHABLE))

    in_parallel(check, tmp_path, "no-document")


def expect_mount(daemon: Daemon, case: Case, status: int) -> str:
    """Mount, with this exit code; returns what was said."""
    done = daemon.nsfs("mount", case.reference, case.target, check=False)
    assert done.returncode == status, (case.letter, done.returncode, done.stderr)
    if done.returncode == SUCCESS:
        assert read(f"{case.target}/d/1") == case.files["d/1"]
        daemon.nsfs("umount", case.target)
    else:
        assert re.search("^nsfs: [a-z]", done.stderr, re.MULTILINE), done.stderr
        assert "Traceback" not in done.stderr
        assert os.listdir(case.target) == []
    return done.stderr


def test_one_fault_in_a_first_pass_harms_nobody(daemon: Daemon, tmp_path: Path) -> None:
    def check(case: Case) -> None:
        case.only_layer()
        case.registry.script = case.letter
        if case.letter in "CF":
            expect_mount(daemon, case, CORRUPT if case.letter == "C" else DENIED)
        with mounted(daemon, case) as root:
            assert {name: read(f"{root}/{name}") for name in case.files} == case.files
        assert case.registry.script == ""

    in_parallel(check, tmp_path, "pass")


def test_a_first_pass_that_never_ends_well_is_a_clear_error(daemon: Daemon, tmp_path: Path) -> None:
    expected = {"C": CORRUPT, "A": DENIED, "F": DENIED, "R": SUCCESS, "W": SUCCESS}

    def check(case: Case) -> None:
        case.only_layer()
        case.registry.script = case.letter * FOR_EVER
        said = expect_mount(daemon, case, expected.get(case.letter, UNREACHABLE))
        if case.letter == "C":
            assert case.layer.digest in said
        case.registry.script = ""
        expect_mount(daemon, case, SUCCESS)

    in_parallel(check, tmp_path, "no-pass")


def test_a_damaged_blob_is_named_and_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    """Both digests are in the error, the pool has none of it, and the next attempt works."""
    files = files_of("damaged")
    layer = plain(files)
    with FakeRegistry() as registry:
        reference = publish(registry, Image((layer,)), "damaged")
        registry.faults_on, registry.script = layer.digest.hex, "C"
        namespace = ("--namespace", "damaged")
        (tmp_path / "mnt").mkdir()
        refused = daemon.nsfs("mount", reference, str(tmp_path / "mnt"), *namespace, check=False)
        assert refused.returncode == CORRUPT
        seen = set(re.findall("sha256:[0-9a-f]{64}", refused.stderr))
        assert len(seen) == 2
        assert layer.digest in seen
        (domain,) = [each for each in daemon.json("status")["domains"] if each["name"] == "ns/damaged"]
        assert domain["local"] == 0
        layout = daemon.layout("ns/damaged")
        assert os.stat(layout.disk).st_blocks * 512 < 100_000
        assert not os.path.exists(layout.spool(LayerKey(layer.digest, "plain")))
        with open_index(layout.index, layout.key, readonly=True) as index:
            assert index.orphan_slabs() == []
        with daemon.mounted(reference, str(tmp_path / "mnt"), *namespace):
            assert read(f"{tmp_path}/mnt/d/0") == files["d/0"]


@pytest.fixture
def evicted(daemon: Daemon) -> Callable[[Case], None]:
    def evict(case: Case) -> None:
        with mounted(daemon, case):
            pass
        daemon.nsfs("evict", case.reference)
        case.only_layer()

    return evict


def test_faults_of_ranges(daemon: Daemon, tmp_path: Path, evicted: Callable[[Case], None]) -> None:
    def check(case: Case) -> None:
        evicted(case)
        with mounted(daemon, case, "--on-error", PATIENCE) as root:
            expect_right(case, root)
            expect_broken(case, root)

    in_parallel(check, tmp_path, "range")


def expect_right(case: Case, root: str) -> None:
    """One fault for each file harms nobody."""
    for name in ("d/0", "d/2"):
        case.registry.script = case.letter
        assert read(f"{root}/{name}") == case.files[name]


def expect_broken(case: Case, root: str) -> None:
    """With the fault for ever a file is right where that can be, else EIO; without it another one is right."""
    case.registry.script = case.letter * FOR_EVER
    if case.letter == "R":
        assert read(f"{root}/d/4") == case.files["d/4"]
    else:
        with pytest.raises(OSError, match="Input/output error"):
            read(f"{root}/d/4")
    case.registry.script = ""
    assert read(f"{root}/d/7") == case.files["d/7"]


def test_faults_of_a_table_of_contents_harm_nobody(daemon: Daemon, tmp_path: Path) -> None:
    def check(case: Case) -> None:
        case.only_layer()
        case.registry.script = case.letter
        if case.letter == "F":
            expect_mount(daemon, case, DENIED)
        with mounted(daemon, case) as root:
            assert read(f"{root}/d/2") == case.files["d/2"]

    in_parallel(check, tmp_path, "toc", estargz)


def test_a_damaged_table_of_contents_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    files = files_of("damaged toc", 1)
    layer = estargz(files)
    (tmp_path / "mnt").mkdir()
    with FakeRegistry() as registry:
        reference = publish(registry, Image((layer,)), "damaged-toc")
        blob = layer.blob
        for at in (len(blob) - 150, len(blob) - 30):
            registry.blobs[layer.digest] = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
            refused = daemon.nsfs("mount", reference, str(tmp_path / "mnt"), check=False)
            assert refused.returncode == CORRUPT, refused.stderr
        registry.blobs[layer.digest] = blob
        with daemon.mounted(reference, str(tmp_path / "mnt")):
            assert read(f"{tmp_path}/mnt/d/0") == files["d/0"]


def test_faults_of_chunks(daemon: Daemon, tmp_path: Path) -> None:
    def check(case: Case) -> None:
        case.only_layer()
        with mounted(daemon, case, "--on-error", PATIENCE) as root:
            expect_right(case, root)
            expect_broken(case, root)

    in_parallel(check, tmp_path, "chunk", estargz)


@pytest.mark.parametrize("make", [plain, estargz])
def test_signed_urls_and_tokens_expire_under_a_mount(
    daemon: Daemon, tmp_path: Path, make: Callable[[dict[str, bytes]], Layer]
) -> None:
    files = files_of(f"expiry {make.__name__}")
    with FakeRegistry(auth="token", redirect=True) as registry:
        reference = publish(registry, Image((make(files),)), "expiry")
        with daemon.mounted(reference, str(tmp_path / "mnt")):
            pass
        daemon.nsfs("evict", reference)
        with daemon.mounted(reference, str(tmp_path / "mnt")):
            for name, data in files.items():
                registry.expire_urls()
                registry.expire_tokens()
                assert read(f"{tmp_path}/mnt/{name}") == data
        assert not [each for each in registry.requests("storage") if "authorization" in each.headers]
