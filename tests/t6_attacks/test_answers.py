"""What a tenant hears of nsfs: the same, to the byte, whether another namespace has an image or not."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest

from fakes import FakeRegistry
from images import Image, directory, file, gzip_layer
from mounting import arena
from nsfs.model.lazy import lazy_name, parse_offer
from nsfs_daemon import run_daemon
from published import publish
from snapshots_api import REF, Backend, mounted, offers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nsfs_daemon import Daemon

__all__ = ["arena"]

CONTENT = b"in the image " * 10_000
FRESH = {"prepare_wait": "30s"}


def image(seed: bytes) -> Image:
    """Images of seeds that are as long differ in what they hold and in nothing else."""
    base = gzip_layer([directory("d"), file("d/large", seed + CONTENT)])
    return Image((base, gzip_layer([file("d/small", seed)])))


class Tenant:
    """A namespace, and what it does with an image."""

    def __init__(self, daemon: Daemon, name: str, path: Path, *, says_who: bool = True) -> None:
        self.name = name
        self._backend = Backend(daemon.socket, namespace=name if says_who else None)
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.__exit__()

    def pull(self, made: Image, reference: str) -> list[str]:
        """Pull it, read in a container, and have a view; gives the names of all snapshots, the view's last."""
        names = self._backend.pull(self.name, made, reference)
        container, view = f"{self.name}/1/c", f"{self.name}/2/v"
        with mounted(self._backend.prepare(container, names[-1]), self._path / "c") as root:
            assert (root / "d/large").read_bytes().endswith(CONTENT)
        self._backend.view(view, names[-1])
        return [*names, container, view]

    def remove(self, held: list[str]) -> None:
        for name in reversed(held):
            self._backend.remove(name)
        self._backend.cleanup()

    def hear(self, made: Image, reference: str, held: list[str]) -> dict[str, Any]:
        """All that it can ask of an image, and of a's records of it, whose names anybody can work out."""
        filters = ["", *(f'labels."{REF}"=={labels[REF]}' for labels in offers(made, reference))]
        heard: dict[str, Any] = {f"list {each}": self._backend.select(*filter(None, [each])) for each in filters}
        for name in [*held, *names_of("a", made, reference)]:
            for asking in (self._backend.stat, self._backend.usage, self._backend.mounts):
                heard[f"{asking.__name__} {name}"] = _answer(asking, name)
        if held:
            with mounted(self._backend.mounts(held[-1]), self._path / "v") as root:
                heard["room"] = room(root)
        return heard


def names_of(namespace: str, made: Image, reference: str) -> list[str]:
    """What the records of an image's layers are called in a namespace."""
    names = [""]
    for labels in offers(made, reference):
        names.append(lazy_name(namespace, "nsfs", names[-1], parse_offer(labels)))
    return names[1:]


def _answer(asking: Callable[[str], Any], name: str) -> Any:
    try:
        return asking(name)
    except grpc.RpcError as error:
        return f"{error.code()}: {error.details()}"


def room(root: Path) -> str:
    """What df says."""
    found = os.statvfs(root)
    return repr((found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree, found.f_favail))


def exactly(heard: dict[str, Any]) -> dict[str, bytes]:
    """Every byte of it."""
    return {question: b"\n".join(map(_wire, _each(answer))) for question, answer in heard.items()}


def _each(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def _wire(answer: Any) -> bytes:
    if isinstance(answer, str):
        return answer.encode()
    data: bytes = answer.SerializeToString(deterministic=True)
    return data


def but_for_names(heard: dict[str, Any], made: Image, reference: str) -> str:
    """All of it, without what is the image's own, the time, and the numbers of snapshots and views."""
    text = repr({question: list(map(str, _each(answer))) for question, answer in heard.items()})
    for labels in offers(made, reference):
        for label in labels.values():
            text = text.replace(label, "<label>")
    for namespace in "ab":
        for name in names_of(namespace, made, reference):
            text = text.replace(name.rpartition("/")[2], "<bound>")
    text = re.sub(r"(seconds|nanos): \d+", r"\1", text)
    return re.sub(r"/(snapshots|l)/[0-9a-f]+", r"/\1/<number>", text)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def test_nothing_changes_when_another_gets_or_loses_it(registry: FakeRegistry, arena: Path) -> None:
    """b has the image; c has not. Whoever calls for no namespace, as only containerd may, hears the difference."""
    made = image(b"1")
    reference = publish(registry, made, "app")
    with ExitStack() as stack:
        daemon = stack.enter_context(run_daemon(str(arena / "d"), FRESH))
        a, b, c = (stack.enter_context(Tenant(daemon, name, arena / name)) for name in "abc")
        containerd = stack.enter_context(Tenant(daemon, "d", arena / "d", says_who=False))
        for name in "abc":
            (arena / name).mkdir()
        stack.enter_context(daemon.mounted(reference, f"{arena}/tree", "--namespace", "b", "--driver", "fuse"))
        held = b.pull(made, reference)

        def heard() -> list[Any]:
            said = [exactly(b.hear(made, reference, held)), exactly(c.hear(made, reference, []))]
            return [*said, room(arena / "tree")]

        before, told = heard(), exactly(containerd.hear(made, reference, []))
        had = a.pull(made, reference)
        assert heard() == before
        assert exactly(containerd.hear(made, reference, [])) != told
        a.remove(had)
        assert heard() == before
        assert a.hear(made, reference, [])["list "] == []


def test_nothing_differs_when_another_has_had_it_before(registry: FakeRegistry, arena: Path) -> None:
    """b gets twins, one after the other, of which a has one."""
    twins = [image(b"1"), image(b"2")]
    references = [publish(registry, made, f"app{number}") for number, made in enumerate(twins)]
    heard = []
    with ExitStack() as stack:
        daemon = stack.enter_context(run_daemon(str(arena / "d"), FRESH))
        a, b = (stack.enter_context(Tenant(daemon, name, arena / name)) for name in "ab")
        for name in "ab":
            (arena / name).mkdir()
        a.pull(twins[0], references[0])
        for made, reference in zip(twins, references, strict=True):
            nothing = b.hear(made, reference, [])
            held = b.pull(made, reference)
            heard.append([but_for_names(each, made, reference) for each in (nothing, b.hear(made, reference, held))])
            b.remove(held)
    assert heard[0] == heard[1]
    assert "NOT_FOUND" in heard[0][0]
