"""The table of contents of an eStargz layer that lies in an image of its own, beside the one whose layers it describes.

Owns where that image is looked for and which of its layers is the table (stargz-snapshotter, docs/estargz.md, "External
TOC", and nativeconverter/estargz/externaltoc, v0.18): same repository, the image's tag with a suffix, a layer that is
annotated with the digest of the blob that it describes. Whether the table is the right one is not judged here; its
digest is in the other image's manifest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nsfs.errors import DeniedError, NotFoundError
from nsfs.format.estargz import TOC_MAX
from nsfs.model import oci

if TYPE_CHECKING:
    from nsfs.core.ports import Source
    from nsfs.model.digest import Digest
    from nsfs.model.oci import Descriptor, Manifest, Platform

SUFFIX: Final = "-esgztoc"
LAYER_DIGEST: Final = "containerd.io/snapshot/stargz/layer.digest"


async def fetch_toc(source: Source, tag: str, blob: Digest, platform: Platform) -> bytes:
    """The gzip member with the table of `blob`, verified by its own digest.

    Raises NotFoundError, which says what was looked for, where there is none; other NsfsErrors where that cannot be
    told.
    """
    if not tag:
        raise NotFoundError(f"the image is named by no tag, so nothing says where {blob.hex[:12]} has its table")
    name = tag + SUFFIX
    try:
        manifest = await _manifest(source, name, platform)
    except (NotFoundError, DeniedError) as error:
        raise NotFoundError(f"there is no image with its table of contents: {name}: {error.message}") from None
    return await source.read_blob(choose_layer(manifest, name, blob), TOC_MAX)


async def _manifest(source: Source, name: str, platform: Platform) -> Manifest:
    document = await source.manifest(name)
    parsed = oci.parse_document(document)
    if isinstance(parsed, oci.Manifest):
        return parsed
    return oci.parse_manifest(await source.manifest(oci.choose_platform(parsed, platform).digest))


def choose_layer(manifest: Manifest, name: str, blob: Digest) -> Descriptor:
    """The layer that is the table of `blob`; raises NotFoundError."""
    for descriptor in manifest.layers:
        if descriptor.notes.get(LAYER_DIGEST) == blob:
            return descriptor
    raise NotFoundError(f"the image with tables of contents has none for layer {blob.hex[:12]}: {name}")
