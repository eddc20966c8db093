"""Records of manual mounts, for tests that care for a few of their fields."""

from __future__ import annotations

from typing import Any

from nsfs.model.mounts import MountRecord


def mount_record(**fields: Any) -> MountRecord:
    """One of a small image by EROFS, with these fields."""
    usual: dict[str, Any] = {
        "id": "m0",
        "target": "/mnt/0",
        "reference": "registry/image:tag",
        "digest": "sha256:0",
        "namespace": "default",
        "domain": "shared",
        "transient": False,
        "driver": "erofs",
        "writable": False,
        "files": 3,
        "size": 30,
        "maps": [],
        "suffix": "",
    }
    return MountRecord(**{**usual, **fields})
