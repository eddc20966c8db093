"""The same images as eStargz, converted by the published Go module.

Owns: the converted layouts in the cache, beside the plain ones; one process at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench import images


def convert(image: images.Built) -> str:
    """The OCI layout of `image` as eStargz, from the cache or made now; raises RuntimeError without a Go toolchain."""
    raise RuntimeError("not yet")
