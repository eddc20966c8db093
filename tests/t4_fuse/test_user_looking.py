"""`nsfs ls`, `cat`, `tree`, `stat`, `inspect`, `status`: what they say, and that they fetch no more than that takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from images import (
    Image,
    Layer,
    directory,
    file,
    gzip_layer,
    opaque,
    symlink,
    tar_layer,
    whiteout,
    write_oci_layout,
    zstd_layer,
)
from nsfs.model.report import render_size
from nsfs_daemon import NSFS, Daemon, run_daemon
from users import cat, estargz_layer, noise, push

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from images import Item
    from meter import Meter
    from registry import Registry


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with run_daemon(str(tmp_path_factory.mktemp("daemon"))) as running:
        yield running


LAYERS: dict[str, Callable[[list[Item]], Layer]] = {
    "tar": tar_layer,
    "gzip": gzip_layer,
    "zstd": zstd_layer,
    "estargz": estargz_layer,
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_format_reads_the_same(daemon: Daemon, registry: Registry, meter: Meter, arena: Path, kind: str) -> None:
    data = noise(300_000, 1)
    items = [directory("etc"), file("etc/data", data), symlink("etc/link", "data"), file("motd", b"hello\n")]
    layer = LAYERS[kind](items)
    push(Image((layer,)), registry, arena, f"kinds-{kind}")
    reference, names = f"{meter.host}/kinds-{kind}", ("--namespace", f"kind-{kind}")
    assert daemon.nsfs("ls", f"{reference}:/", *names).stdout == "etc\nmotd\n"
    assert daemon.nsfs("cat", f"{reference}:/motd", *names).stdout == "hello\n"
    assert cat(daemon, f"{reference}:/etc/link", *names) == data
    assert daemon.nsfs("tree", reference, *names).stdout.splitlines() == [
        "/",
        "├── etc",
        "│   ├── data",
        "│   └── link -> data",
        "└── motd",
    ]
    (entry,) = daemon.json("stat", f"{reference}:/etc/link", *names)
    assert (entry["kind"], entry["target"], entry["layer"]) == ("symlink", "data", layer.digest)
    (described,) = daemon.json("inspect", reference, *names)["layers"]
    assert described["format"] == {"gzip": "tar+gzip", "zstd": "tar+zstd"}.get(kind, kind)
    assert described["indexed"]
    assert "table of contents" in described["verified"] if kind == "estargz" else "diff ID" in described["verified"]


def test_what_the_top_layer_decides_costs_the_top_layer(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    hidden = [directory("hidden"), opaque("hidden"), file("hidden/y", b"y\n")]
    bottom = gzip_layer([directory("d"), file("d/below", noise(900_000, 2)), file("gone", b"1")])
    middle = gzip_layer([directory("hidden"), file("hidden/x", noise(500_000, 3)), file("middle", b"m")])
    top = gzip_layer([directory("d"), file("d/top", b"top\n"), whiteout("gone"), *hidden])
    push(Image((bottom, middle, top)), registry, arena, "decided")
    reference = f"{meter.host}/decided"
    first = daemon.nsfs("cat", f"{reference}:/d/top", "--namespace", "decided")
    assert first.stdout == "top\n"
    size = f"{len(top.blob)} B"
    assert f"plain layer {top.digest.hex[:12]} must be read once, whole, to be indexed: {size} to download" in (
        first.stderr
    )
    assert daemon.nsfs("cat", f"{reference}:/hidden/y", "--namespace", "decided").stderr == ""
    assert daemon.nsfs("ls", f"{reference}:/hidden", "--namespace", "decided").stdout == "y\n"
    assert daemon.json("stat", f"{reference}:/d/top", "--namespace", "decided")[0]["size"] == 4
    gone = daemon.nsfs("stat", f"{reference}:/gone", "--namespace", "decided", check=False)
    assert (gone.returncode, gone.stdout) == (3, "")
    assert meter.served(bottom.digest) == meter.served(middle.digest) == 0
    assert meter.served(top.digest) == len(top.blob)
    assert daemon.nsfs("cat", f"{reference}:/middle", "--namespace", "decided").stdout == "m"
    assert meter.served(bottom.digest) == 0
    assert meter.served(middle.digest) == len(middle.blob)
    assert daemon.nsfs("ls", f"{reference}:/d", "--namespace", "decided").stdout == "below\ntop\n"
    assert meter.served(bottom.digest) == len(bottom.blob)


def test_the_cost_is_said_before_the_download(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    layers = [gzip_layer([file(f"f{n}", noise(400_000, 10 + n))]) for n in range(3)]
    push(Image(layers), registry, arena, "announced")
    total = sum(len(layer.blob) for layer in layers)
    meter.hold_after = 1000
    with daemon.started("tree", f"{meter.host}/announced", "--namespace", "announced") as running:
        assert running.stderr is not None
        assert running.stdout is not None
        said = running.stderr.readline()
        assert said == f"3 plain layers must be read once, whole, to be indexed: {render_size(total)} to download\n"
        assert meter.served(layers[0].digest) <= 1000
        assert running.stderr.readline().startswith("index ")
        meter.hold_after = None
        assert running.stdout.read().splitlines() == ["/", "├── f0", "├── f1", "└── f2"]
        finished = [line for line in running.stderr.read().splitlines() if line.endswith("done")]
        assert len(finished) == len(set(finished)) <= 3


def test_an_estargz_file_costs_its_table_and_its_chunk(
    daemon: Daemon, registry: Registry, meter: Meter, arena: Path
) -> None:
    data = noise(4_000_000, 4)
    layer = estargz_layer([file("big", data), file("small", b"small\n")], 250_000)
    push(Image((layer,)), registry, arena, "chunks")
    names = ("--namespace", "chunks")
    done = daemon.nsfs("cat", f"{meter.host}/chunks:/small", *names)
    assert (done.stdout, done.stderr) == ("small\n", "")
    assert meter.served(layer.digest) < len(layer.blob) / 12
    before = meter.served(layer.digest)
    target = str(arena / "mnt")
    with daemon.mounted(f"{meter.host}/chunks", target, *names), open(f"{target}/big", "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(opened.fileno(), 100, 2_100_000) == data[2_100_000:2_100_100]
        assert meter.served(layer.digest) - before < 2.2 * 250_000
        (mount,) = [one for one in daemon.json("status")["mounts"] if one["target"] == target]
        assert 0 < mount["fetched"] <= meter.served(layer.digest)
        assert 0 < mount["local"] < 1_000_000


def test_a_layout_is_read_and_nothing_is_said_of_downloads(daemon: Daemon, arena: Path) -> None:
    image = Image((gzip_layer([file("a", noise(50_000, 5))]), gzip_layer([file("b", b"b\n")])))
    layout = write_oci_layout(arena / "layout", image, tag="v1")
    for reference in (f"oci:{layout}", f"oci:{layout}:v1"):
        done = daemon.nsfs("cat", f"{reference}:/b", "--namespace", "layout")
        assert (done.stdout, done.stderr) == ("b\n", "")
    (mounted,) = [one for one in daemon.json("status")["domains"] if one["name"] == "ns/layout"]
    assert (mounted["layers"], mounted["fetched"]) == (1, 0)
    command = [*NSFS, "--socket", daemon.socket, "ls", "oci:layout:/"]
    assert subprocess.run(command, cwd=arena, check=True, capture_output=True, text=True).stdout == "a\nb\n"


def test_the_socket_may_come_from_the_environment(daemon: Daemon) -> None:
    environment = os.environ | {"NSFS_SOCKET": daemon.socket}
    said = subprocess.run([*NSFS, "status", "--json"], env=environment, check=True, capture_output=True).stdout
    assert json.loads(said)["root"] == daemon.root


def test_inspect_says_what_is_lazy_and_why(daemon: Daemon, registry: Registry, meter: Meter, arena: Path) -> None:
    plain = gzip_layer([file("plain", noise(200_000, 6))])
    lazy = estargz_layer([file("lazy", noise(200_000, 7))], 50_000)
    push(Image((plain, lazy)), registry, arena, "inspected")
    reference, names = f"{meter.host}/inspected", ("--namespace", "inspected")
    first, second = daemon.json("inspect", reference, *names)["layers"]
    assert (first["lazy"], first["indexed"], first["local"]) == (False, False, 0)
    assert "first use reads all of it once" in first["why"]
    assert (second["lazy"], second["indexed"], second["format"]) == (True, False, "estargz")
    assert meter.served(plain.digest) == meter.served(lazy.digest) == 0
    daemon.nsfs("evict", reference, *names)
    with daemon.mounted(reference, str(arena / "mnt"), *names) as report:
        assert (report["files"], report["size"]) == (2, 400_000)
    daemon.nsfs("evict", reference, *names)
    first, second = daemon.json("inspect", reference, *names)["layers"]
    assert (first["lazy"], first["indexed"], first["local"]) == (True, True, 0)
    assert first["stream_size"] == len(plain.tar)
    text = daemon.nsfs("inspect", reference, *names).stdout
    assert re.search(r"^size +\S+ KiB in 2 layers$", text, re.MULTILINE)
    assert "1 file, 0 B local" in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("cat", "HOST/decent:/nope"), 3, "no such file in the image"),
        (("cat", "HOST/decent:/d"), 2, "not a regular file but a directory: /d"),
        (("ls", "HOST/decent:/file/x"), 3, "file"),
        (("cat", "HOST/decent:/out"), 3, ""),
        (("cat", "HOST/decent:/loop"), 3, "symlinks"),
        (("cat", "HOST/nothing:/x"), 3, "the registry has no such thing"),
        (("cat", "HOST/decent:nope:/x"), 3, "the registry has no such thing"),
        (("cat", "HOST/decent@sha256:12:/x"), 2, "digest"),
        (("cat", "HOST/UPPER:/x"), 2, "UPPER"),
        (("cat", "127.0.0.1:1/a:/x"), 5, "127.0.0.1:1"),
        (("cat", "oci:/nowhere:/x"), 3, "/nowhere"),
        (("ls", "HOST/decent:/", "--isolation", "pod"), 4, "pod"),
        (("ls", "HOST/decent:/", "--isolation", "none"), 2, "isolation"),
        (("ls", "HOST/decent:/", "--namespace", "a/b"), 2, "namespace"),
        (("ls", "HOST/decent:/", "--platform", "linux/arm64"), 3, "linux/arm64"),
        (("ls", "HOST/decent:/", "--platform", "x"), 2, "platform"),
        (("umount", "/nowhere"), 3, "/nowhere"),
        (("inspect",), 2, "REF"),
    ],
)
def test_failures_say_why_and_end_with_their_code(
    daemon: Daemon, decent: str, arguments: tuple[str, ...], code: int, says: str
) -> None:
    failed = daemon.nsfs(*(word.replace("HOST", decent) for word in arguments), check=False)
    assert (failed.returncode, failed.stdout) == (code, ""), failed.stderr
    first = next(line for line in failed.stderr.splitlines() if line.startswith("nsfs: "))
    assert says in first
    assert "Traceback" not in failed.stderr


@pytest.fixture(scope="module")
def decent(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    items = [directory("d"), file("file", b"x"), symlink("out", "/../../etc/shadow"), symlink("loop", "loop")]
    push(Image((gzip_layer(items),)), registry, tmp_path_factory.mktemp("decent"), "decent")
    return registry.host


MOUNT = {"id", "target", "reference", "digest", "namespace", "domain", "driver", "writable", "files", "size", "local"}


def test_what_scripts_read(daemon: Daemon, decent: str, arena: Path) -> None:
    reference, names = f"{decent}/decent", ("--namespace", "scripts")
    with daemon.mounted(reference, str(arena / "mnt"), *names) as report:
        assert set(report) >= MOUNT | {"fetched", "state"}
        status = daemon.json("status")
        assert set(status) >= {"version", "private", "root", "mounts", "domains"}
        (mount,) = status["mounts"]
        assert (mount["digest"], mount["files"], mount["state"]) == (report["digest"], 1, "ready")
        domain = next(one for one in status["domains"] if one["name"] == "ns/scripts")
        assert set(domain) >= {"name", "pid", "layers", "local", "fetched", "waiting", "state"}
    image = daemon.json("inspect", reference, *names)
    assert set(image) >= {"reference", "digest", "platform", "size", "domain", "layers", "config"}
    assert image["config"]["Cmd"] == ["/bin/sh"]
    assert set(image["layers"][0]) >= {"digest", "media_type", "size", "diff_id", "format", "lazy", "why", "verified"}
    assert set(daemon.json("evict", reference, *names)) == {"layers", "freed"}
    (entry,) = daemon.json("stat", f"{reference}:/file", *names)
    assert set(entry) >= {"path", "kind", "mode", "uid", "gid", "size", "mtime_ns", "links", "xattrs", "layer"}
    assert [one["path"] for one in daemon.json("ls", f"{reference}:/", *names)] == ["/d", "/file", "/loop", "/out"]
    assert {one["path"] for one in daemon.json("tree", reference, *names)} >= {"/d", "/file", "/loop", "/out"}


def test_a_configuration_is_checked_without_being_served(daemon: Daemon, arena: Path) -> None:
    right, wrong = arena / "right.toml", arena / "wrong.toml"
    right.write_text('log_level = "debug"\n[kernel]\nfile_backed = false\nresend = false\nidmap = false\n')
    wrong.write_text("[kernel]\nfilebacked = false\n")
    assert daemon.nsfs("serve", "--check", "--config", str(right)).returncode == 0
    refused = daemon.nsfs("serve", "--check", "--config", str(wrong), check=False)
    assert refused.returncode == 2
    assert "file_backed" in refused.stderr
    assert daemon.nsfs("serve", "--check", "--config", "/nowhere", check=False).returncode == 3
