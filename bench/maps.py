"""How long our own part of a mount takes: maps made from indexes, views mounted, a new layer on a known base.

Measured over the control socket, so that the start of a command's interpreter is not in the figures. The image has
50,000 files in 10 layers and is local; the registry on loopback is asked for the manifest as always. What it takes for
a new layer's documents and bytes is not ours: a plain client asks for those of another image, as new to the registry,
and that is taken off. Nor is what the disk still has to write of the new images themselves, so that is written out
before.
"""

from __future__ import annotations

import glob
import http.client
import json
import os
import time
from functools import partial
from typing import TYPE_CHECKING

import lmdb

from bench import stacks
from bench.harness import Bench, Figure, seconds, write_out
from images import directory, file, gzip_layer, sample_content
from nsfs.model.report import ImageReport
from nsfs.serve import api
from nsfs.serve.client import Control, open_control
from nsfs_daemon import run_daemon
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

_FILES, _LAYERS = 50_000, 10
_SOME_FILE = "usr/lib/003/0001/000123.py"
_SETTLED = 0.5
"""Seconds after which a registry has done with what was pushed to it."""


def measure(bench: Bench) -> None:
    """All of it."""
    scratch = bench.scratch("maps")
    push_layout(stacks.many_files(f"{scratch}/layout", _FILES, _LAYERS), bench.registry, "maps")
    reference = f"{bench.registry.host}/maps:latest"
    target = f"{scratch}/mnt"
    os.mkdir(target)
    with run_daemon(f"{scratch}/nsfs") as daemon, open_control(daemon.socket) as control:
        _mount(control, reference, target, _SOME_FILE)
        _umount(control, target)
        warm = [_time_mount(control, reference, target, _SOME_FILE) for _ in range(bench.samples)]
        _add(bench, "mounted and readable, maps exist", warm, 100)
    _add(bench, f"maps of {_FILES:,} files made and mounted", _build_maps(bench, scratch, reference, target), 1000)
    _measure_new_layer(bench, scratch, reference)


def _build_maps(bench: Bench, scratch: str, reference: str, target: str) -> list[float]:
    """With the indexes there and the maps gone, in a daemon that has just started, but whose worker runs."""
    times = []
    for _ in range(bench.samples):
        forget_maps(f"{scratch}/nsfs/root")
        with run_daemon(f"{scratch}/nsfs") as daemon, open_control(daemon.socket) as control:
            control.call("Inspect", api.ImageRequest(reference=reference), ImageReport)  # starts the worker
            times.append(_time_mount(control, reference, target, _SOME_FILE))
    return times


def forget_maps(root: str) -> None:
    """Delete all maps, as if the layers had been indexed but never mounted; no daemon may run."""
    for path in glob.glob(f"{root}/domains/*/layers/*/*/map*.erofs"):
        os.unlink(path)
    for path in glob.glob(f"{root}/domains/*/index.lmdb"):
        with lmdb.open(path, subdir=False, max_dbs=16) as environment, environment.begin(write=True) as transaction:
            transaction.drop(environment.open_db(b"maps", transaction), delete=False)


def _measure_new_layer(bench: Bench, scratch: str, reference: str) -> None:
    times = []
    target, base = f"{scratch}/mnt", f"{scratch}/base"
    os.mkdir(base)
    with run_daemon(f"{scratch}/nsfs") as daemon, open_control(daemon.socket) as control:
        _mount(control, reference, base, _SOME_FILE)
        for number in range(bench.samples):
            names = [_push_new(bench, scratch, 2 * number + each) for each in range(2)]
            write_out(scratch)
            time.sleep(_SETTLED)
            took = _time_mount(control, f"{bench.registry.host}/{names[0]}:latest", target, "srv/new")
            times.append(took - seconds(partial(_ask, bench.registry.host, names[1])))
        _umount(control, base)
    _add(bench, "a new layer of 1 MiB, without the registry's time", times, 50)


def _push_new(bench: Bench, scratch: str, number: int) -> str:
    """The name of an image that has one more layer, of 1 MiB; nobody asked for it yet."""
    fresh = gzip_layer([directory("srv"), file("srv/new", sample_content(1 << 20, seed=number))])
    layout = stacks.many_files(f"{scratch}/new{number}", _FILES, _LAYERS, fresh)
    push_layout(layout, bench.registry, f"maps/{number}")
    return f"maps/{number}"


def _ask(host: str, name: str) -> None:
    """What a mount of an image asks for whose layers are known but the last: manifest, configuration, that layer."""
    connection = http.client.HTTPConnection(host)
    manifest = json.loads(_get(connection, f"/v2/{name}/manifests/latest"))
    for document in (manifest["config"], manifest["layers"][-1]):
        assert len(_get(connection, f"/v2/{name}/blobs/{document['digest']}")) == document["size"]
    connection.close()


def _get(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
    with connection.getresponse() as answer:
        assert answer.status == http.client.OK, f"the registry answers {answer.status}: {path}"
        return answer.read()


def _add(bench: Bench, name: str, times: Sequence[float], goal: float) -> None:
    milliseconds = [time * 1000 for time in times]
    bench.add(Figure(name=name, unit="ms", samples=milliseconds, higher_is_better=False, goal=goal))


def _time_mount(control: Control, reference: str, target: str, path: str) -> float:
    took = seconds(lambda: _mount(control, reference, target, path))
    _umount(control, target)
    return took


def _mount(control: Control, reference: str, target: str, path: str) -> None:
    control.call("Mount", api.MountRequest(reference=reference, target=target), api.MountReport)
    with open(f"{target}/{path}", "rb") as opened:
        opened.read()


def _umount(control: Control, target: str) -> None:
    control.call("Umount", api.UmountRequest(target=target), api.Empty)
