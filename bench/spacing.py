"""How far apart the checkpoints of a plain layer are to lie: seconds and bytes of a start against bytes of index.

Starts with an index alone are recorded over a slow line, and replayed (`bench.replay`) with checkpoints that were made
at other distances. STARTS names the images, by commas; a sample is a recording, which all distances are tried on.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from bench import REPOSITORY, images
from bench.harness import FORGET_ALL, Bench, Figure, chosen_images
from bench.replay import Layer, Read, Replayed, parse_reads, replay
from nsfs.bench.command import rehearse, run_command, with_config
from nsfs.bench.line import FREE, Shape, run_line
from nsfs.bench.node import Node, run_node
from nsfs.bench.pages import drop_caches, forget_pages
from nsfs.bench.roots import NAMESPACE
from nsfs.core.layers import PLAIN
from nsfs.format.checkpoints import CheckpointScanner
from nsfs.model.digest import Digest
from nsfs.model.layer import Codec, Covers, Span, Spans
from nsfs.model.pool import LayerKey
from nsfs.serve.config import load_system_config
from nsfs.store.layers import store_spans
from nsfs_daemon import stored_domain
from registry import push_layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_IMAGES = ("numpy", "java", "postgres", "redis")
_SPACINGS = tuple(kib << 10 for kib in (128, 256, 512, 1024))
_LINE = Shape(12.5e6, 0.03)
_TIMEOUT = 300.0
_FED = 1 << 20


def measure(bench: Bench) -> None:
    """All of it."""
    for name in chosen_images(_IMAGES):
        image = images.build(images.RECIPES[name])
        push_layout(image.layout, bench.registry, name)
        directory = bench.scratch(name)
        starts = _record(bench, image, directory)
        for spacing in _SPACINGS:
            layers = dict(_lay_out(image, directory, spacing))
            _report(bench, f"{name}, {spacing >> 10} KiB", layers, [_replay(bench, reads, layers) for reads in starts])


def _record(bench: Bench, image: images.Built, directory: str) -> list[list[Read]]:
    """The reads of starts with an index alone; what the node knows of the image stays in `directory`/node."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")]))}
    with (
        run_line(bench.registry.host) as line,
        run_node(f"{directory}/node", load_system_config(), environment, program="bench.traced") as node,
    ):
        reference = f"{line.host}/{image.recipe.name}:latest"
        node.index(reference, NAMESPACE)
        starts = []
        for _ in range(bench.samples):
            line.shape = FREE
            node.evict(reference, NAMESPACE)
            drop_caches() if FORGET_ALL else forget_pages(node.disks())
            rehearse()
            line.shape = _LINE
            starts.append(_start(node, reference, image, directory))
    return starts


def _start(node: Node, reference: str, image: images.Built, directory: str) -> list[Read]:
    command = with_config(image.recipe.command, image.recipe.ready, node.resolve(reference, NAMESPACE).config)
    target = f"{directory}/mnt"
    os.makedirs(target, exist_ok=True)
    with open(f"{directory}/node/log", encoding="utf-8", errors="replace") as log:
        log.seek(0, os.SEEK_END)
        node.mount(reference, target, NAMESPACE, profile="off")
        try:
            run_command(target, command, timeout=_TIMEOUT)
            return parse_reads(log)
        finally:
            node.umount(target)


def _lay_out(image: images.Built, directory: str, spacing: int) -> Iterator[tuple[str, Layer]]:
    """The image's layers with checkpoints at that distance."""
    domain = stored_domain(f"{directory}/node/root")
    for layer in image.layers:
        key = LayerKey(Digest(layer.digest), PLAIN)
        tables = f"{directory}/{spacing}/{layer.digest}"
        os.makedirs(tables)
        shutil.copy(f"{domain.layer_dir(key)}/segments", tables)
        with open(layer.blob, "rb") as file:
            blob = file.read()
        store_spans(tables, Spans(Codec.DEFLATE, Covers.COMPRESSED, _spans(blob, spacing)), domain.key)
        yield f"{key.blob}/{key.index}", Layer(tables, blob, domain.key)


def _spans(blob: bytes, spacing: int) -> list[Span]:
    scanner, data = CheckpointScanner(spacing), memoryview(blob)
    found = [span for start in range(0, len(blob), _FED) for span in scanner.feed(bytes(data[start : start + _FED]))]
    return found + scanner.finish()


def _replay(bench: Bench, reads: Sequence[Read], layers: dict[str, Layer]) -> Replayed:
    directory = bench.scratch("pool")
    try:
        return replay(reads, layers, _LINE, directory)
    finally:
        shutil.rmtree(directory)


def _report(bench: Bench, name: str, layers: dict[str, Layer], starts: Sequence[Replayed]) -> None:
    kept = sum(os.path.getsize(f"{layer.directory}/spans") for layer in layers.values())
    bench.add(_figure(f"{name}: first output, replayed", "s", [start.seconds for start in starts]))
    bench.add(_figure(f"{name}: over the line", "MB", [start.received / 1e6 for start in starts]))
    bench.add(_figure(f"{name}: checkpoints on disk", "MB", [kept / 1e6]))


def _figure(name: str, unit: str, samples: Sequence[float]) -> Figure:
    return Figure(name=name, unit=unit, samples=samples, higher_is_better=False)
