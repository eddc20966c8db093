"""What a front is started with."""

from __future__ import annotations

from msgspec import Struct


class FrontArgs(Struct, frozen=True, kw_only=True):
    """What a front is started with.

    Its descriptors: /dev/fuse, mounted already, the domain's live bitmap, and a pipe for a byte when it serves.
    """

    domain: str
    """The domain's directory."""
    worker: str
    """Path of the worker's socket."""
    maps: tuple[str, ...]
    """Files of the layers' maps, top first."""
    views: tuple[str, ...]
    """Names of the views, as the worker knows them, in the same order."""
    info: dict[str, str | int | bool] = {}
    """What `.nsfs/mount.json` says: reference, digest, …"""
