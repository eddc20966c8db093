"""Layers and manifests made to harm: a clear error for that image, or one that is cleaned; the worker goes on."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from fakes import FakeRegistry
from images import (
    TAR_GZIP,
    TAR_ZSTD,
    Image,
    Layer,
    character,
    checksummed,
    directory,
    file,
    gzip_layer,
    hardlink,
    header,
    opaque,
    padded,
    pax_record,
    render_tar,
    sparse,
    symlink,
    tar_layer,
    whiteout,
)
from mounting import swept
from nsfs.model.digest import Digest
from nsfs_daemon import Daemon, run_daemon
from published import hand_made_estargz, publish, publish_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

OK, NOT_FOUND, UNREACHABLE, CORRUPT, UNSUPPORTED = 0, 3, 5, 6, 9
MEMORY = 300 << 20
"""Bytes that a job may have had at its peak, whatever it was given; one that does nothing has some 45 MiB."""
BOUND = 60.0
"""Seconds for one image; the slowest takes 3 on an idle machine."""
BOUND_OF_A_MILLION = 240.0
"""Seconds for one of a million entries."""
END = bytes(1024)
EIB = 1 << 60


@dataclass
class Watch:
    """The peak memory of all processes below one, without those that are spared, looked at often."""

    root: int
    spared: frozenset[int] = frozenset()
    peaks: dict[int, int] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self.over.wait(0.01):
            for pid in self.below() - self.spared:
                with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
                    found = re.search(r"VmHWM:\s+(\d+) kB", status.read())
                    if found is not None:
                        self.peaks[pid] = int(found[1]) << 10

    def below(self) -> frozenset[int]:
        return frozenset(self._below(self.root))

    def _below(self, pid: int) -> Iterator[int]:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as children:
            for child in children.read().split():
                yield int(child)
                yield from self._below(int(child))


@contextlib.contextmanager
def watching_jobs(worker: int) -> Iterator[Watch]:
    """Jobs are below the zygote, as the worker is: the grandchildren that come."""
    with open(f"/proc/{worker}/stat") as stat:
        zygote = int(stat.read().rpartition(")")[2].split()[1])
    with watched(Watch(zygote, Watch(zygote).below())) as watch:
        yield watch


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[Watch]:
    thread = threading.Thread(target=watch.look)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(
        str(tmp_path_factory.mktemp("daemon")),
        {"registry": {"read_timeout": "2s"}, "namespace.tight": {"memory": "256MiB"}},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture(scope="module")
def worker(daemon: Daemon, registry: FakeRegistry, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The process that all of this is thrown at."""
    target = str(tmp_path_factory.mktemp("first") / "mnt")
    with daemon.mounted(publish(registry, Image((gzip_layer([file("a", b"a")]),)), "first"), target):
        return daemon.workers()["ns/default"]


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Path]:
    with swept(tmp_path):
        yield tmp_path


def try_mount(
    daemon: Daemon,
    reference: str,
    target: Path,
    statuses: tuple[int, ...],
    look: Callable[[str], object] = os.listdir,
    bound: float = BOUND,
) -> str:
    """Mount and look, or be told why not; returns what was said."""
    target.mkdir()
    begun = time.monotonic()
    done = daemon.nsfs("mount", reference, str(target), check=False)
    assert time.monotonic() - begun < bound
    assert done.returncode in statuses, (done.returncode, done.stderr)
    if done.returncode == OK:
        look(str(target))
        daemon.nsfs("umount", str(target))
    else:
        assert re.search("^nsfs: [a-z]", done.stderr, re.MULTILINE)
        assert len(done.stderr) < 2000
        assert os.listdir(target) == []
    assert "Traceback" not in done.stderr
    return done.stderr


def check_alive(daemon: Daemon, registry: FakeRegistry, worker: int, path: Path) -> None:
    """The same worker serves an image that it has not seen."""
    content = os.urandom(5000)
    reference = publish(registry, Image((gzip_layer([file("f", content)]),)), f"good/{content.hex()[:10]}")
    with daemon.mounted(reference, str(path / "good")), open(path / "good/f", "rb") as opened:
        assert opened.read() == content
    assert daemon.workers()["ns/default"] == worker


def sized(size: int, name: bytes = b"f") -> bytes:
    """A header whose size is base-256."""
    block = bytearray(header(name, b"0"))
    block[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    block[124] |= 0x80
    return checksummed(bytes(block))


def pax(name: bytes, *records: tuple[bytes, bytes]) -> bytes:
    body = b"".join(pax_record(key, value) for key, value in records)
    return header(b"PaxHeaders/x", b"x", size=len(body)) + padded(body) + header(name, b"0")


def blob_of(blob: bytes, media_type: str, tar: bytes = b"") -> Layer:
    return Layer(tar or b"nothing", blob, media_type)


@dataclass(frozen=True)
class Bomb(Layer):
    """A layer whose tar is too large to be kept."""

    known: str = ""

    @property
    def diff_id(self) -> Digest:
        return Digest(self.known)


def gzip_bomb() -> Layer:
    """A file of 1 GiB of zeros in 5 MB."""
    size = 1 << 30
    packer = zlib.compressobj(1, wbits=31)
    digest, parts = hashlib.sha256(), []
    for part in (sized(size, b"bomb"), *[bytes(1 << 24)] * (size >> 24), END):
        digest.update(part)
        parts.append(packer.compress(part))
    blob = b"".join(parts) + packer.flush()
    return Bomb(b"", blob, TAR_GZIP, known="sha256:" + digest.hexdigest())


def zstd_bomb() -> Layer:
    """1 GiB behind the end of an archive, in one frame of 35 KB."""
    tar = render_tar([file("small", b"small")])
    packer = zstandard.ZstdCompressor().compressobj()
    digest, parts = hashlib.sha256(), []
    for part in (tar, *[bytes(1 << 24)] * 64):
        digest.update(part)
        parts.append(packer.compress(part))
    return Bomb(b"", b"".join(parts) + packer.flush(), TAR_ZSTD, known="sha256:" + digest.hexdigest())


LAYERS: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "leaves the root": (lambda: gzip_layer([file("../x", b"x")]), (CORRUPT,)),
    "leaves the root later": (lambda: gzip_layer([file("a/b/../../../x", b"x")]), (CORRUPT,)),
    "absolute": (lambda: gzip_layer([file("/etc/passwd", b"x"), symlink("/abs", "/etc")]), (OK,)),
    "link out": (lambda: gzip_layer([hardlink("x", "../../etc/shadow")]), (CORRUPT,)),
    "name of 64 KiB": (lambda: gzip_layer([file(b"n" * 65536, b"x")]), (CORRUPT,)),
    "path of 64 KiB": (lambda: gzip_layer([file(b"n/" * 32768, b"x")]), (CORRUPT,)),
    "target of 64 KiB": (lambda: gzip_layer([symlink("x", b"n/" * 32768)]), (CORRUPT,)),
    "name with NUL": (lambda: gzip_layer(pax(b"x", (b"path", b"a\0b")) + END), (OK, CORRUPT)),
    "deep": (lambda: gzip_layer([file(b"d/" * 2000 + b"f", b"x")]), (OK, CORRUPT)),
    "negative size": (lambda: gzip_layer(sized(-1) + END), (CORRUPT,)),
    "size of 8 EiB": (lambda: gzip_layer(sized(8 * EIB - 1) + END), (CORRUPT,)),
    "PAX size of 8 EiB": (lambda: gzip_layer(pax(b"x", (b"size", b"%d" % (8 * EIB - 1))) + END), (CORRUPT,)),
    "PAX negative size": (lambda: gzip_layer(pax(b"x", (b"size", b"-1")) + END), (CORRUPT,)),
    "size without bytes": (lambda: gzip_layer(header(b"f", b"0", size=1 << 30) + b"x" * 512), (CORRUPT,)),
    "sparse 8 EiB": (lambda: gzip_layer([sparse("s", 8 * EIB - 1, [(8 * EIB - 2, b"x")])]), (CORRUPT,)),
    "sparse 15 TiB": (lambda: gzip_layer([sparse("s", 15 << 40, [(1 << 40, b"x")])]), (CORRUPT,)),
    "sparse a thousand times 0.9 TiB": (
        lambda: gzip_layer([sparse(f"s{n}", 900 << 30, [(n, b"x")]) for n in range(1000)]),
        (CORRUPT,),
    ),
    "link to itself": (lambda: gzip_layer([hardlink("a", "a")]), (CORRUPT,)),
    "links in a circle": (lambda: gzip_layer([hardlink("a", "b"), hardlink("b", "a")]), (CORRUPT,)),
    "symlinks in a circle": (lambda: gzip_layer([symlink("a", "b"), symlink("b", "a"), file("a/x", b"x")]), (CORRUPT,)),
    "symlink to itself": (lambda: gzip_layer([symlink("a", "a/a/a"), file("a/b/c", b"x")]), (CORRUPT,)),
    "symlink out": (lambda: gzip_layer([symlink("a", "../../../.."), file("a/x", b"x")]), (OK, CORRUPT)),
    "link to a directory": (lambda: gzip_layer([directory("d"), hardlink("e", "d")]), (CORRUPT,)),
    "whiteout device": (lambda: gzip_layer([character("w", 0, 0)]), (CORRUPT,)),
    "device of no kernel": (lambda: gzip_layer([character("w", 1 << 20, 1 << 20)]), (CORRUPT,)),
    "whiteout of nothing": (lambda: gzip_layer([file(".wh.", b"")]), (CORRUPT,)),
    "whiteout of the root": (lambda: gzip_layer([file(".wh..", b""), file("a/.wh...", b"")]), (CORRUPT,)),
    "inside a whiteout": (lambda: gzip_layer([file(".wh.a/b", b"x")]), (CORRUPT,)),
    "whiteouts beside names": (
        lambda: gzip_layer([whiteout("a"), file("a", b"x"), opaque("d"), file("d/e", b"e"), opaque("")]),
        (OK,),
    ),
    "aufs's names": (lambda: gzip_layer([directory(".wh..wh.plnk"), file(".wh..wh.aufs", b"")]), (OK, CORRUPT)),
    "overlay's attributes": (
        lambda: gzip_layer(
            [
                directory("d", xattrs={"trusted.overlay.opaque": b"y", "user.overlay.opaque": b"y"}),
                file("f", b"f", xattrs={"trusted.overlay.redirect": b"/etc/shadow", "trusted.overlay.metacopy": b""}),
            ]
        ),
        (OK,),
    ),
    "attribute of 1 MiB": (lambda: gzip_layer([file("f", b"", xattrs={"user.x": b"x" * 900_000})]), (CORRUPT,)),
    "attribute without a name": (
        lambda: gzip_layer(pax(b"x", (b"SCHILY.xattr.", b"v"), (b"SCHILY.xattr.none", b"v")) + END),
        (OK, CORRUPT),
    ),
    "a name a thousand times": (lambda: gzip_layer([file("same", b"%d" % n) for n in range(1000)]), (OK,)),
    "a directory and a file by turns": (
        lambda: gzip_layer([item for n in range(500) for item in (directory("d"), file("d/e", b"%d" % n), file("d"))]),
        (OK, CORRUPT),
    ),
    "headers without end": (
        lambda: gzip_layer(pax(b"x", *((b"k%d" % n, b"v" * 1000) for n in range(900)))[:-512] * 300 + END, level=1),
        (CORRUPT,),
    ),
    "a long name of 8 GiB": (lambda: gzip_layer(header(b"x", b"L", size=8 * (1 << 30) - 1) + END), (CORRUPT,)),
    "cut off": (lambda: gzip_layer(render_tar([file("f", b"x" * 10_000)])[:5000]), (CORRUPT,)),
    "no tar": (lambda: gzip_layer(random.Random(1).randbytes(100_000)), (CORRUPT,)),
    "nothing": (lambda: tar_layer(b""), (OK, CORRUPT)),
    "no gzip": (lambda: blob_of(b"no gzip at all", TAR_GZIP), (CORRUPT,)),
    "gzip with a name of 3 MiB": (
        lambda: blob_of(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (3 << 20) + b"\0", TAR_GZIP),
        (CORRUPT,),
    ),
    "100,000 empty members": (
        lambda: replace(
            gzip_layer([file("a", b"a")]),
            blob=gzip.compress(b"", mtime=0) * 100_000 + gzip_layer([file("a", b"a")]).blob,
        ),
        (OK,),
    ),
    "zstd with a window of 2 GiB": (
        lambda: blob_of(b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\0\0", TAR_ZSTD),
        (UNSUPPORTED,),
    ),
    "zstd that skips 4 GiB": (lambda: blob_of(b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + b"x" * 100, TAR_ZSTD), (CORRUPT,)),
    "gzip bomb": (gzip_bomb, (OK,)),
    "zstd bomb": (zstd_bomb, (OK,)),
}


def repository(text: str) -> str:
    return "hostile/" + re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def try_all(
    daemon: Daemon, registry: FakeRegistry, path: Path, cases: Mapping[str, tuple[Callable[[], Layer], tuple[int, ...]]]
) -> None:
    """Mount an image of each of these layers; several at once, as it happens on a host."""

    def run(name: str) -> None:
        make, statuses = cases[name]
        target = path / repository(name).replace("/", "-")
        try:
            try_mount(daemon, publish(registry, Image((make(),)), f"{path.name}/{repository(name)}"), target, statuses)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, cases))


def test_hostile_layers(daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path) -> None:
    with watching_jobs(worker) as watch:
        try_all(daemon, registry, arena, LAYERS)
    print(f"peak memory of any job: {max(watch.peaks.values()) >> 20} MiB")
    assert max(watch.peaks.values()) < MEMORY
    check_alive(daemon, registry, worker, arena)
    assert os.stat(f"{daemon.root}/domains/ns%2Fdefault/disk").st_blocks * 512 < 100 << 20


def test_what_is_cleaned_has_no_marks(daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path) -> None:
    layer = LAYERS["overlay's attributes"][0]()
    below = gzip_layer([file("d/below", b"seen")])
    with daemon.mounted(publish(registry, Image((below, layer)), "marks"), str(arena / "mnt")):
        assert os.listdir(arena / "mnt/d") == ["below"]
        assert (arena / "mnt/f").read_bytes() == b"f"
        for name in ("d", "f"):
            assert not [each for each in os.listxattr(arena / "mnt" / name) if "overlay" in each]
    assert daemon.workers()["ns/default"] == worker


GOOD = b"good content " * 100
MEMBER = gzip.compress(GOOD, mtime=0)
SHA = "sha256:" + hashlib.sha256(GOOD).hexdigest()


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "reg", "mode": 0o644} | more


def chunk(**more: Any) -> dict[str, Any]:
    return row("f", size=len(GOOD), digest=SHA, chunkDigest=SHA) | more


TABLES: dict[str, tuple[Callable[[], Layer], tuple[int, ...]]] = {
    "good": (lambda: hand_made_estargz([chunk()], MEMBER), (OK,)),
    "leaves the root": (lambda: hand_made_estargz([chunk(name="../f")], MEMBER), (CORRUPT,)),
    "absolute": (lambda: hand_made_estargz([chunk(name="/f")], MEMBER), (OK,)),
    "name of 64 KiB": (lambda: hand_made_estargz([row("n" * 65536)]), (CORRUPT,)),
    "name with NUL": (lambda: hand_made_estargz([row("a\0b")]), (CORRUPT,)),
    "negative size": (lambda: hand_made_estargz([chunk(size=-1)], MEMBER), (CORRUPT,)),
    "size of 8 EiB": (lambda: hand_made_estargz([chunk(size=8 * EIB - 1)], MEMBER), (CORRUPT, UNSUPPORTED)),
    "size of 2 EiB": (lambda: hand_made_estargz([chunk(size=2 * EIB)], MEMBER), (UNSUPPORTED,)),
    "size over any integer": (lambda: hand_made_estargz([chunk(size=1 << 200)], MEMBER), (CORRUPT,)),
    "more than a terabyte": (
        lambda: hand_made_estargz(
            [row(f"f{n}", size=127 << 20, chunkDigest=SHA, offset=n) for n in range(9000)], bytes(9000)
        ),
        (CORRUPT,),
    ),
    "chunks that overlap": (
        lambda: hand_made_estargz([chunk(), chunk(name="g", innerOffset=10)], MEMBER),
        (CORRUPT,),
    ),
    "chunk behind the end": (lambda: hand_made_estargz([chunk(offset=1 << 40)], MEMBER), (CORRUPT,)),
    "negative offset": (lambda: hand_made_estargz([chunk(offset=-5)], MEMBER), (CORRUPT,)),
    "negative chunk": (lambda: hand_made_estargz([chunk(chunkSize=-5)], MEMBER), (CORRUPT,)),
    "inner offset of 1 EiB": (lambda: hand_made_estargz([chunk(innerOffset=EIB)], MEMBER), (UNSUPPORTED,)),
    "chunk without a digest": (lambda: hand_made_estargz([row("f", size=5)], MEMBER), (CORRUPT,)),
    "digest of no kind": (lambda: hand_made_estargz([chunk(chunkDigest="sha256:../../x")], MEMBER), (CORRUPT,)),
    "chunks of nothing": (lambda: hand_made_estargz([{"name": "x", "type": "chunk"}]), (CORRUPT,)),
    "type of no kind": (lambda: hand_made_estargz([{"name": "x", "type": "door"}]), (CORRUPT,)),
    "links in a circle": (
        lambda: hand_made_estargz([row("a", type="hardlink", linkName="b"), row("b", type="hardlink", linkName="a")]),
        (CORRUPT,),
    ),
    "link out": (lambda: hand_made_estargz([row("a", type="hardlink", linkName="../../x")]), (CORRUPT,)),
    "symlinks in a circle": (
        lambda: hand_made_estargz(
            [row("a", type="symlink", linkName="b"), row("b", type="symlink", linkName="a"), row("a/x")]
        ),
        (CORRUPT,),
    ),
    "whiteout device": (lambda: hand_made_estargz([row("w", type="char")]), (CORRUPT,)),
    "whiteout of nothing": (lambda: hand_made_estargz([row(".wh.")]), (CORRUPT,)),
    "overlay's attributes": (
        lambda: hand_made_estargz(
            [{"name": "d", "type": "dir", "mode": 493, "xattrs": {"trusted.overlay.opaque": "eQ=="}}]
        ),
        (OK,),
    ),
    "a name a thousand times": (lambda: hand_made_estargz([row("same") for _ in range(1000)]), (OK,)),
    "time of no calendar": (lambda: hand_made_estargz([row("f", modtime="9999-99-99T99:99:99Z")]), (CORRUPT,)),
    "no entries": (lambda: hand_made_estargz([]), (OK,)),
    "version of the future": (lambda: hand_made_estargz([], version=2), (UNSUPPORTED,)),
    "nested without end": (
        lambda: hand_made_estargz([], extra=json.loads("[" * 900 + "]" * 900)),
        (OK, CORRUPT),
    ),
    "bomb": (lambda: hand_made_estargz([], extra=" " * (160 << 20)), (CORRUPT,)),
}


def test_hostile_tables_of_contents(daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path) -> None:
    with watching_jobs(worker) as watch:
        try_all(daemon, registry, arena, TABLES)
    print(f"peak memory of any job: {max(watch.peaks.values()) >> 20} MiB")
    assert max(watch.peaks.values()) < 3 * MEMORY
    check_alive(daemon, registry, worker, arena)


@pytest.mark.parametrize(
    ("name", "rows", "payload"),
    [
        ("other content", [chunk(digest=SHA, chunkDigest="sha256:" + "5" * 64)], MEMBER),
        ("a bomb", [chunk(chunkDigest="sha256:" + "6" * 64)], gzip.compress(bytes(1 << 30), 1)),
        ("no gzip", [chunk()], b"no gzip" * 100),
        ("too short", [chunk(size=120 << 20)], MEMBER),
    ],
    ids=["other content", "a bomb", "no gzip", "too short"],
)
def test_a_chunk_that_is_not_what_the_table_says_is_an_error(
    daemon: Daemon,
    registry: FakeRegistry,
    worker: int,
    arena: Path,
    name: str,
    rows: list[Mapping[str, Any]],
    payload: bytes,
) -> None:
    reference = publish(registry, Image((hand_made_estargz(rows, payload),)), "chunk-" + repository(name))
    with watched(Watch(daemon.pid)) as watch, daemon.mounted(reference, str(arena / "mnt"), "--on-error", "eio"):
        with pytest.raises(OSError, match="Input/output error"):
            (arena / "mnt/f").read_bytes()
        (domain,) = daemon.json("status")["domains"]
        assert domain["waiting"] == 0
    assert watch.peaks[worker] < MEMORY
    check_alive(daemon, registry, worker, arena)


def test_a_table_cannot_name_its_way_into_what_others_have(
    daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path
) -> None:
    """A forged table that states the digest of a file of another image does not get that file."""
    secret = random.Random(99).randbytes(50_000)
    digest = "sha256:" + hashlib.sha256(secret).hexdigest()
    forged = hand_made_estargz([row("f", size=len(secret), digest=digest, chunkDigest=digest)], MEMBER)
    with daemon.mounted(publish(registry, Image((gzip_layer([file("s", secret)]),)), "secret"), str(arena / "s")):
        assert (arena / "s/s").read_bytes() == secret
        reference = publish(registry, Image((forged,)), "forged")
        with daemon.mounted(reference, str(arena / "f"), "--on-error", "eio"), pytest.raises(OSError, match="Input"):
            (arena / "f/f").read_bytes()
    assert daemon.workers()["ns/default"] == worker


def manifests(registry: FakeRegistry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """References of images whose documents lie."""
    layer = gzip_layer([file("f", b"manifest")])
    other = gzip_layer([file("g", b"other")])
    good, right = layer.descriptor(), str(layer.diff_id)
    for each in (layer, other):
        registry.add_blob(each.blob)
    wrong = "sha256:" + "0" * 64

    def made(name: str, layers: list[dict[str, Any]], diff_ids: list[str], **config: Any) -> str:
        return publish_manifest(registry, "manifest-" + repository(name), layers, diff_ids, config=config)

    cases: list[tuple[str, list[dict[str, Any]], list[str], dict[str, Any], tuple[int, ...]]]
    cases = [
        ("digest with a path", [{**good, "digest": "sha256:../../../../etc/passwd"}], [right], {}, (CORRUPT,)),
        ("digest in upper case", [{**good, "digest": good["digest"].upper()}], [right], {}, (CORRUPT,)),
        ("digest cut short", [{**good, "digest": good["digest"][:-1]}], [right], {}, (CORRUPT,)),
        ("digest of md5", [{**good, "digest": "md5:" + "0" * 32}], [right], {}, (CORRUPT,)),
        ("unknown blob", [{**good, "digest": wrong}], [right], {}, (NOT_FOUND,)),
        ("size too small", [{**good, "size": good["size"] - 1}], [right], {}, (CORRUPT, UNREACHABLE)),
        ("size too large", [{**good, "size": good["size"] + 9}], [right], {}, (CORRUPT, UNREACHABLE)),
        ("size negative", [{**good, "size": -1}], [right], {}, (CORRUPT,)),
        ("size of 8 EiB", [{**good, "size": 8 * EIB - 1}], [right], {}, (CORRUPT,)),
        ("diff ID of nothing", [good], [wrong], {}, (CORRUPT,)),
        ("diff IDs exchanged", [good, other.descriptor()], [str(other.diff_id), right], {}, (CORRUPT,)),
        ("diff ID with a path", [good], ["sha256:../../x"], {}, (CORRUPT,)),
        ("too few diff IDs", [good, good], [right], {}, (CORRUPT,)),
        ("too many diff IDs", [good], [right, right], {}, (CORRUPT,)),
        ("2,000 layers", [good] * 2000, [right] * 2000, {}, (UNSUPPORTED,)),
        ("config of another kind", [good], [right], {"mediaType": "application/x-helm"}, (UNSUPPORTED,)),
        ("config of 1 GiB", [good], [right], {"size": 1 << 30}, (CORRUPT,)),
        ("config that is not there", [good], [right], {"digest": wrong}, (NOT_FOUND,)),
        ("layer of another kind", [{**good, "mediaType": "text/html"}], [right], {}, (UNSUPPORTED,)),
        ("encrypted layer", [{**good, "mediaType": TAR_GZIP + "+encrypted"}], [right], {}, (UNSUPPORTED,)),
    ]
    return {name: (made(name, layers, ids, **config), statuses) for name, layers, ids, config, statuses in cases}


def test_hostile_manifests(daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path) -> None:
    cases = manifests(registry)

    def run(name: str) -> None:
        reference, statuses = cases[name]
        try:
            try_mount(daemon, reference, arena / repository(name).replace("/", "-"), statuses)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, cases))
    check_alive(daemon, registry, worker, arena)


def test_a_layer_known_as_right_is_no_excuse_for_a_wrong_claim(
    daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path
) -> None:
    layer = gzip_layer([file("f", b"known")])
    try_mount(daemon, publish(registry, Image((layer,)), "claim-right"), arena / "1", (OK,))
    wrong = publish_manifest(registry, "claim-wrong", [layer.descriptor()], [str(Digest.of(b"something else"))])
    said = try_mount(daemon, wrong, arena / "2", (CORRUPT,))
    assert str(layer.diff_id) in said
    check_alive(daemon, registry, worker, arena)


def million_entries() -> bytes:
    """A tar of a million empty files in one directory, made by patching one header."""
    base = header(b"d/00000000", b"0", mtime=1)
    before, between, behind = base[:2], base[10:148], base[156:]
    constant = sum(base) - sum(base[148:156]) + 8 * 32 - 8 * 48
    names = (b"%08d" % number for number in range(1_000_000))
    blocks = (b"%b%b%b%06o\0 %b" % (before, name, between, constant + sum(name), behind) for name in names)
    return render_tar([directory("d")], end=b"") + b"".join(blocks) + END


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_entries(daemon: Daemon, registry: FakeRegistry, worker: int, arena: Path) -> None:
    tar = million_entries()
    layer = Layer(tar, gzip.compress(tar, 1, mtime=0), TAR_GZIP)
    rows = [row(f"d/{number:08}") for number in range(1_000_000)]
    table = hand_made_estargz([{"name": "d", "type": "dir", "mode": 0o755}, *rows])
    for number, each in enumerate((layer, table)):
        reference = publish(registry, Image((each,)), f"million/{number}")
        with watching_jobs(worker) as watch:
            try_mount(
                daemon,
                reference,
                arena / str(number),
                (OK,),
                lambda path: os.stat(f"{path}/d/00777777"),
                BOUND_OF_A_MILLION,
            )
        print(f"peak memory of a job with a million entries: {max(watch.peaks.values()) >> 20} MiB")
        assert max(watch.peaks.values()) < 1500 << 20
    check_alive(daemon, registry, worker, arena)
    (arena / "tight").mkdir()
    tight = daemon.nsfs(
        "mount", f"{registry.host}/million/0", str(arena / "tight"), "--namespace", "tight", check=False
    )
    assert (tight.returncode, f"more memory than a job may have: {256 << 20} bytes" in tight.stderr) == (7, True)
    small = publish(registry, Image((gzip_layer([file("f", b"small")]),)), "million/small")
    with daemon.mounted(small, str(arena / "tight"), "--namespace", "tight"):
        assert (arena / "tight/f").read_bytes() == b"small"
