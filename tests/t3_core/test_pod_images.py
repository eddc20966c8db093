"""What is asked of an image for pods, how often, and that nothing is left of the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

import trio_tests
from nsfs.core import worker_api
from nsfs.core.pods import PodImages
from nsfs.core.scopes import Scopes
from nsfs.errors import NotFoundError, UnsupportedError
from nsfs.model.lazy import LazyLayer
from nsfs.model.policy import Isolation, Policy, ScopeRequest

if TYPE_CHECKING:
    from nsfs.errors import NsfsError
    from nsfs.model.policy import Domain

IMAGE = "registry/x@sha256:" + "0" * 64
BLOBS = ["sha256:" + digit * 64 for digit in "abc"]


class Workers:
    """An image of all BLOBS but the last; or what is wrong with it."""

    def __init__(self, error: NsfsError | None = None) -> None:
        self.error = error
        self.asked: list[str] = []
        self.ended: list[str] = []

    async def call(self, domain: Domain, method: str, params: Any, result: Any, report: object = None) -> Any:
        assert (method, params.reference, domain.transient) == ("Check", IMAGE, True)
        self.asked.append(domain.name)
        await trio.sleep(1)
        if self.error is not None:
            raise self.error
        names = [worker_api.LayerName(reference=IMAGE, blob=blob, chain=blob) for blob in BLOBS[:-1]]
        return worker_api.Checked(layers=names)

    async def end(self, domain: Domain) -> None:
        await trio.lowlevel.checkpoint()
        self.ended.append(domain.name)


async def check(pods: PodImages, blob: str, namespace: str = "red") -> None:
    request = ScopeRequest(namespace=namespace, references=(IMAGE,), plugin="nsfs")
    await pods.check(request, LazyLayer(reference=IMAGE, blob=blob, chain=blob))


def pods_of(workers: Workers) -> PodImages:
    return PodImages(workers, Scopes(Policy(Isolation.POD), str))


def test_an_image_is_asked_after_once_for_each_pull() -> None:
    workers = Workers()

    async def body() -> None:
        pods = pods_of(workers)
        for blob in BLOBS[:-1]:
            await check(pods, blob)
        with pytest.raises(NotFoundError, match="no layer"):
            await check(pods, BLOBS[-1])
        assert len(workers.asked) == 1
        await check(pods, BLOBS[0], "blue")
        await trio.sleep(120)
        await check(pods, BLOBS[0])

    trio_tests.run(body)
    assert len(set(workers.asked)) == 3
    assert workers.ended == workers.asked


def test_the_domain_ends_also_where_the_question_fails_or_is_given_up() -> None:
    workers = Workers(UnsupportedError("encrypted"))

    async def body() -> None:
        pods = pods_of(workers)
        with pytest.raises(UnsupportedError):
            await check(pods, BLOBS[0])
        with trio.move_on_after(0.5):
            await check(pods, BLOBS[0])

    trio_tests.run(body)
    assert len(workers.asked) == 2
    assert workers.ended == workers.asked
