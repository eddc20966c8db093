"""The same images as eStargz, converted by the published Go module, as `ctr-remote` and `nerdctl` would.

Owns: the converted layers, in the cache beside the plain ones. Needs Go 1.19 (Debian's golang-go) and the module proxy
where the converter has not been built yet.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import goestargz
from bench import CACHE, images

if TYPE_CHECKING:
    from bench.images import Built, Layer

_TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"


def convert(image: Built, cache: str = CACHE) -> str:
    """The OCI layout of `image` as eStargz, from the cache or made now; raises OSError or CalledProcessError."""
    layers = [convert_layer(layer, cache) for layer in image.layers]
    layout = f"{cache}/images/{image.recipe.name}-estargz"
    return images.write_layout(layout, [layer for layer, _ in layers], image.recipe.command, [toc for _, toc in layers])


def convert_layer(layer: Layer, cache: str = CACHE) -> tuple[Layer, dict[str, str]]:
    """The layer as eStargz, from the cache or made now, and the annotations of its descriptor."""
    directory = os.path.dirname(layer.blob)
    facts, blob = f"{directory}/estargz.json", f"{directory}/estargz.tar.gz"
    with images.alone(cache):
        if not os.path.exists(facts):
            with open(layer.blob, "rb") as file:
                made = goestargz.convert(file.read())
            with open(blob, "wb") as out:
                out.write(made.blob)
            _store(facts, {"diff_id": made.diff_id, "toc_digest": made.toc_digest})
    with open(facts) as stored:
        known = json.load(stored)
    annotations = {_TOC_DIGEST: known["toc_digest"]}
    return images.describe_blob(layer, blob, known["diff_id"]), annotations


def _store(path: str, document: dict[str, Any]) -> None:
    with open(f"{path}.partial", "w") as file:
        json.dump(document, file)
    os.rename(f"{path}.partial", path)
