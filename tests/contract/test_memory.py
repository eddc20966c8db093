"""A domain's memory of images and of who has which blob: the same promises of the fake and of the domain's index."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from core_sources import FakeMemory, digest_of
from nsfs.core.blobs import NOBODY, Origins
from nsfs.core.images import ImageMemory
from nsfs.model.pool import Access, ImageRecord
from nsfs.store.index import open_index


class Memory(ImageMemory, Origins, Protocol):
    """Both."""


@contextmanager
def fake(_: Path) -> Iterator[Memory]:
    yield FakeMemory()


@contextmanager
def real(directory: Path) -> Iterator[Memory]:
    with open_index(str(directory / "index.lmdb")) as index:
        yield index


@pytest.fixture(params=[fake, real])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    with request.param(tmp_path) as opened:
        yield opened


def image(number: int) -> ImageRecord:
    config, manifest = b"{%d}" % number, bytes([number, 0, 255])
    digest = digest_of(manifest, "sha512")
    return ImageRecord(repository="r", manifest=manifest, media_type="t", config=config, digest=digest)


def test_an_image_is_as_it_was_put_last(memory: Memory) -> None:
    assert memory.image("r:latest linux/amd64") is None
    for number in (1, 2, 2):
        memory.put_image("r:latest linux/amd64", image(number))
    assert memory.image("r:latest linux/amd64") == image(2)
    assert memory.image("r:latest linux/arm64") is None


def test_the_repository_named_last_is_the_first_and_each_is_there_once(memory: Memory) -> None:
    blob = digest_of(b"blob", "sha512")
    assert memory.origins(blob, NOBODY) == []
    for name in ("a", "b", "a", "c", "c"):
        memory.put_origin([blob], name, NOBODY)
    assert memory.origins(blob, NOBODY) == [("", "c"), ("", "a"), ("", "b")]
    assert memory.origins(digest_of(b"blob"), NOBODY) == []


def test_what_one_owner_knows_is_no_other_s(memory: Memory) -> None:
    blob = digest_of(b"blob")
    ours, theirs = Access("team-a", "0" * 16), Access("team-a/x", "0" * 16)
    elsewhere = Access("team-a", "1" * 16)
    for access, name in ((ours, "a"), (theirs, "b"), (ours, "c")):
        memory.put_origin([blob], name, access)
    assert memory.origins(blob, ours) == [("team-a", "c"), ("team-a", "a")]
    assert memory.origins(blob, theirs) == [("team-a/x", "b")]
    assert memory.origins(blob, elsewhere) == memory.origins(blob, NOBODY) == []
    anybody = memory.origins(blob, Access("", "0" * 16))
    assert sorted(anybody) == [("team-a", "a"), ("team-a", "c"), ("team-a/x", "b")]
