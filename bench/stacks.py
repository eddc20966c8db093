"""Images of many layers and of many files, and the same layers as overlayfs over directories, to compare with."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from typing import TYPE_CHECKING

import oracle
from bench import CACHE, images
from images import Image, directory, file, gzip_layer, tar_layer, write_oci_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from images import Item, Layer


def deepen(base: images.Built, count: int, cache: str = CACHE) -> images.Built:
    """`base` with small layers on top, `count` in all: each adds to old and new directories, and replaces a file."""
    root = f"{cache}/stacks/{base.recipe.name}-{count}"
    added = (_filler(number, f"{root}/{number}") for number in range(len(base.layers), count))
    layers = (*base.layers, *added)
    return images.Built(base.recipe, images.write_layout(f"{root}/layout", layers), layers)


def _filler(number: int, path: str) -> images.Layer:
    if not os.path.exists(f"{path}/layer.json"):
        shutil.rmtree(path, ignore_errors=True)
        for place in ("usr/lib/python3/dist-packages", "etc", "usr/share", f"srv/app/layer-{number}"):
            os.makedirs(f"{path}/upper/{place}/filler-{number % 8}")
            for name in range(8):
                _write(f"{path}/upper/{place}/filler-{number % 8}/{number}-{name}", number * 100 + name)
        _write(f"{path}/upper/etc/replaced", number)
        with open(f"{path}/layer.json", "w") as out:
            json.dump(images.write_layer(f"{path}/upper", f"{path}/layer.tar.gz"), out)
    with open(f"{path}/layer.json") as facts:
        return images.Layer(upper=f"{path}/upper", blob=f"{path}/layer.tar.gz", **json.load(facts))


def _write(path: str, number: int) -> None:
    with open(path, "w") as out:
        out.write(f"{number}\n" * 50)


def many_files(path: str, files: int, layers: int, *more: Layer) -> str:
    """The OCI layout of an image of so many small files in so many layers, and `more` layers on top."""
    crowds = tuple(_crowd(number, files // layers) for number in range(layers))
    return str(write_oci_layout(path, Image((*crowds, *more))))


def _crowd(number: int, files: int) -> Layer:
    items: list[Item] = []
    for name in range(files):
        if name % 100 == 0:
            items.append(directory(f"usr/lib/{number:03}/{name // 100:04}"))
        content = b"%d of layer %d\n" % (name, number) * 40
        items.append(file(f"usr/lib/{number:03}/{name // 100:04}/{name:06}.py", content))
    return gzip_layer(items, level=1)


def one_large(size: int) -> Layer:
    """A layer of one file, `large`, of so many bytes (whole MiB) that do not compress."""
    source = random.Random(5)
    return tar_layer([file("large", b"".join(source.randbytes(1 << 20) for _ in range(size >> 20)))])


def many_bytes(path: str, size: int) -> str:
    """The OCI layout of an image of `one_large` alone."""
    return str(write_oci_layout(path, Image((one_large(size),))))


@contextlib.contextmanager
def overlay(built: images.Built, scratch: str) -> Iterator[str]:
    """The image's layers unpacked as containerd does, put together by overlayfs, read-only, at the path it gives."""
    with oracle.overlay_of([layer.blob for layer in built.layers], f"{scratch}/stack") as merged:
        yield merged
