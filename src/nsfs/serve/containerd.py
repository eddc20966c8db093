"""A client of containerd's own gRPC API, as far as nsfs needs it (containerd 1.6 to 2.x).

Translates only: requests to messages, statuses to NsfsError by their code. Everything is done in one namespace, but for
`namespaces` and `deletions`, and under one lease while `lease` lasts, so that garbage collection leaves alone what
nothing refers to yet.

For trio; any number of calls at a time. A call that is cancelled is cancelled in containerd, too.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import secrets
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from nsfs.core.pull import Mounts
from nsfs.core.tasks import running
from nsfs.errors import ERRORS, BusyError, CorruptError, ExistsError, NotFoundError, NsfsError, UnreachableError
from nsfs.model.digest import Digest
from nsfs.serve.client import probe

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: its own log lines are not for our users

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from nsfs.serve.proto import (
    content_pb2,
    descriptor_pb2,
    diff_pb2,
    events_pb2,
    images_pb2,
    introspection_pb2,
    leases_pb2,
    namespaces_pb2,
    snapshots_pb2,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from google.protobuf.message import Message

    from nsfs.model.oci import Descriptor
    from nsfs.model.pull import Content

log = logging.getLogger(__name__)

M = TypeVar("M", bound="Message")

_OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_SERVICES = "/containerd.services."
_SNAPSHOTTER = "io.containerd.snapshotter.v1"
_DELETED = "/namespaces/delete"
"""The topic of the events."""
_LEASE_LIFE = timedelta(hours=24)
"""After which a lease whose owner was killed holds nothing any more."""
_LOCKED_PAUSE = 0.2
"""Seconds between attempts to write what somebody else is writing."""
_GOODBYE = 5.0
"""Seconds for cleaning up."""


class Containerd:
    """One namespace of a containerd. Create it by `open_containerd`."""

    def __init__(self, channel: grpc.Channel, path: str, namespace: str) -> None:
        self._channel = channel
        self._path = path
        self._metadata = [("containerd-namespace", namespace)]

    async def has_snapshotter(self, name: str) -> bool:
        """Whether there is a snapshotter of that name, proxied or not."""
        return await self.snapshotter_address(name) is not None

    async def snapshotter_address(self, name: str) -> str | None:
        """The unix socket of a proxied snapshotter, "" for one of containerd's own, None where there is none."""
        found = [address for found, address in await self._snapshotters() if found == name]
        return found[0] if found else None

    async def has_snapshotter_at(self, socket: str) -> bool:
        """Whether a snapshotter of its is served at the unix socket `socket`."""
        return any(_is_same_path(address, socket) for _, address in await self._snapshotters() if address)

    async def _snapshotters(self) -> list[tuple[str, str]]:
        """Name and unix socket of each; the latter is "" for containerd's own."""
        request = introspection_pb2.PluginsRequest(filters=[f"type=={_SNAPSHOTTER}"])
        said = await self._call("introspection.v1.Introspection/Plugins", request, introspection_pb2.PluginsResponse)
        return [(plugin.id, plugin.exports.get("address", "").removeprefix("unix://")) for plugin in said.plugins]

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[None]:
        """Keep what is made meanwhile from garbage collection; at the end, what nothing refers to may go."""
        name = await self._create_lease("nsfs-pull")
        self._metadata.append(("containerd-lease", name))
        try:
            yield
        finally:
            self._metadata.pop()
            await self._give_up("leases.v1.Leases/Delete", leases_pb2.DeleteRequest(id=name))

    async def collect_garbage(self) -> None:
        """Have containerd remove all that nothing refers to, and wait for it: what the end of a lease can ask for."""
        name = await self._create_lease("nsfs-collect")
        await self._call("leases.v1.Leases/Delete", leases_pb2.DeleteRequest(id=name, sync=True), Empty)

    async def _create_lease(self, purpose: str) -> str:
        name = f"{purpose}-{secrets.token_hex(8)}"
        expires = (datetime.now(UTC) + _LEASE_LIFE).isoformat(timespec="seconds")
        request = leases_pb2.CreateRequest(id=name, labels={"containerd.io/gc.expire": expires})
        await self._call("leases.v1.Leases/Create", request, leases_pb2.CreateResponse)
        return name

    async def labels(self, digest: Digest) -> dict[str, str] | None:
        """The labels of a blob of the content store, None if this namespace has no such blob."""
        try:
            said = await self._call(
                "content.v1.Content/Info", content_pb2.InfoRequest(digest=digest), content_pb2.InfoResponse
            )
        except NotFoundError:
            return None
        return dict(said.info.labels)

    async def set_labels(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set these labels of a blob; others stay."""
        request = content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=digest, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
        )
        await self._call("content.v1.Content/Update", request, content_pb2.UpdateResponse)

    @asynccontextmanager
    async def writer(self, content: Content) -> AsyncIterator[Writer]:
        """Write a blob, from where an earlier attempt stopped; raises ExistsError where it is there.

        Waits while somebody else writes the same blob.
        """
        while True:
            writer = Writer(self._stream("content.v1.Content/Write"), content)
            try:
                await writer.begin()
                break
            except UnreachableError as error:
                writer.close()
                if " locked" not in error.message:
                    raise
            except BaseException:
                writer.close()
                raise
            await trio.sleep(_LOCKED_PAUSE)
        try:
            yield writer
        except CorruptError:
            writer.close()
            await self._give_up("content.v1.Content/Abort", content_pb2.AbortRequest(ref=content.ref))
            raise
        finally:
            writer.close()

    async def has_snapshot(self, snapshotter: str, name: str) -> bool:
        """Whether this namespace has a snapshot of that name."""
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=name)
        try:
            await self._call("snapshots.v1.Snapshots/Stat", request, snapshots_pb2.StatSnapshotResponse)
        except NotFoundError:
            return False
        return True

    async def prepare(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> Mounts:
        """Begin a snapshot; raises ExistsError where the snapshotter has what `labels` name."""
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
        said = await self._call("snapshots.v1.Snapshots/Prepare", request, snapshots_pb2.PrepareSnapshotResponse)
        return Mounts(said.SerializeToString())

    async def apply(self, descriptor: Descriptor, mounts: Mounts) -> Digest:
        """Have a blob of the content store unpacked; gives the digest of its tar."""
        prepared = snapshots_pb2.PrepareSnapshotResponse.FromString(mounts)
        request = diff_pb2.ApplyRequest(diff=_descriptor(descriptor), mounts=prepared.mounts)
        said = await self._call("diff.v1.Diff/Apply", request, diff_pb2.ApplyResponse)
        return Digest(said.applied.digest)

    async def commit(self, snapshotter: str, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Make an active snapshot a committed one; raises ExistsError where there is one of that name."""
        request = snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, name=name, key=key, labels=labels)
        await self._call("snapshots.v1.Snapshots/Commit", request, Empty)

    async def remove(self, snapshotter: str, key: str) -> None:
        """Give up a snapshot, as well as it goes."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        await self._give_up("snapshots.v1.Snapshots/Remove", request)

    async def put_image(self, name: str, target: Descriptor) -> None:
        """Have `name` stand for `target`, whatever it stood for."""
        image = images_pb2.Image(name=name, target=_descriptor(target))
        try:
            create = images_pb2.CreateImageRequest(image=image)
            await self._call("images.v1.Images/Create", create, images_pb2.CreateImageResponse)
        except ExistsError:
            update = images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target"]))
            await self._call("images.v1.Images/Update", update, images_pb2.UpdateImageResponse)

    async def remove_existing(self, snapshotter: str, key: str) -> None:
        """Remove a snapshot, if there is one; raises BusyError where something stands on it."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        with suppress(NotFoundError):
            await self._call("snapshots.v1.Snapshots/Remove", request, Empty)

    async def image_target(self, name: str) -> Digest | None:
        """What an image record stands for, None if there is none."""
        request = images_pb2.GetImageRequest(name=name)
        try:
            said = await self._call("images.v1.Images/Get", request, images_pb2.GetImageResponse)
        except NotFoundError:
            return None
        return Digest(said.image.target.digest)

    async def images_of(self, target: Digest) -> list[str]:
        """The names of all image records that stand for `target`."""
        request = images_pb2.ListImagesRequest(filters=[f'target.digest=="{target}"'])
        said = await self._call("images.v1.Images/List", request, images_pb2.ListImagesResponse)
        return [image.name for image in said.images]

    async def delete_image(self, name: str) -> None:
        """Delete an image record, if there is one."""
        with suppress(NotFoundError):
            await self._call("images.v1.Images/Delete", images_pb2.DeleteImageRequest(name=name), Empty)

    async def namespaces(self) -> set[str]:
        """All that this containerd has."""
        request = namespaces_pb2.ListNamespacesRequest()
        said = await self._call("namespaces.v1.Namespaces/List", request, namespaces_pb2.ListNamespacesResponse)
        return {each.name for each in said.namespaces}

    @asynccontextmanager
    async def deletions(self) -> AsyncIterator[trio.MemoryReceiveChannel[str]]:
        """Names of namespaces as they are deleted, whichever; raises UnreachableError where containerd ends that."""
        subscribe: grpc.UnaryStreamMultiCallable[Message, events_pb2.Envelope] = self._channel.unary_stream(
            _SERVICES + "events.v1.Events/Subscribe",
            events_pb2.SubscribeRequest.SerializeToString,
            events_pb2.Envelope.FromString,
        )
        call = subscribe(events_pb2.SubscribeRequest(filters=[f'topic=="{_DELETED}"']), metadata=tuple(self._metadata))
        send, receive = trio.open_memory_channel[str](math.inf)
        try:
            async with running(partial(self._hand_on, call, send)):
                yield receive
        finally:
            call.cancel()

    async def _hand_on(self, events: Iterator[events_pb2.Envelope], send: trio.MemorySendChannel[str]) -> None:
        while (event := await trio.to_thread.run_sync(self._next, events, abandon_on_cancel=True)) is not None:
            send.send_nowait(events_pb2.NamespaceDelete.FromString(event.event.value).name)
        raise UnreachableError(f"containerd ended its events: {self._path}")

    def _next(self, events: Iterator[events_pb2.Envelope]) -> events_pb2.Envelope | None:
        try:
            return next(events, None)
        except grpc.RpcError as error:
            raise _translate(error, self._path) from None

    async def _give_up(self, method: str, request: Message) -> None:
        """Clean up, also where the caller is cancelled; what fails here garbage collection makes good."""
        with trio.move_on_after(_GOODBYE, shield=True):
            try:
                await self._call(method, request, Empty)
            except NsfsError as error:
                log.debug("containerd did not clean up: %s: %s", method, error)

    async def _call(self, method: str, request: Message, kind: type[M]) -> M:
        start: grpc.UnaryUnaryMultiCallable[Message, M] = self._channel.unary_unary(
            _SERVICES + method, type(request).SerializeToString, kind.FromString
        )
        call = start.future(request, metadata=tuple(self._metadata))
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        call.add_done_callback(lambda _: _tell(token, done))
        try:
            await done.wait()
            return call.result()
        except grpc.RpcError as error:
            raise _translate(error, self._path) from None
        finally:
            call.cancel()

    def _stream(self, method: str) -> _Stream:
        start: grpc.StreamStreamMultiCallable[Message, content_pb2.WriteContentResponse] = self._channel.stream_stream(
            _SERVICES + method,
            content_pb2.WriteContentRequest.SerializeToString,
            content_pb2.WriteContentResponse.FromString,
        )
        return _Stream(lambda requests: start(requests, metadata=tuple(self._metadata)), self._path)


class Runtime:
    """core.recall.Runtime over the containerd at a unix socket, connected to anew for each call."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def delete_images(self, namespace: str, name: str, manifest: str) -> int:
        """See core.recall.Runtime. What an index lists is in its labels, by which containerd keeps it."""
        async with open_containerd(self._path, namespace) as containerd:
            target = await containerd.image_target(name)
            if target is None:
                return 0
            if target != manifest and manifest not in (await containerd.labels(target) or {}).values():
                return 0
            names = await containerd.images_of(target)
            for each in names:
                await containerd.delete_image(each)
            return len(names)

    async def remove_snapshots(self, namespace: str, snapshotter: str, keys: Sequence[str]) -> None:
        """See core.recall.Runtime."""
        async with open_containerd(self._path, namespace) as containerd:
            await containerd.collect_garbage()
            for key in keys:
                await containerd.remove_existing(snapshotter, key)


class _Responses(Protocol):
    def __next__(self) -> content_pb2.WriteContentResponse: ...

    def __iter__(self) -> Iterator[content_pb2.WriteContentResponse]: ...

    def cancel(self) -> object: ...


class _Stream:
    """A call of many requests, each with its response."""

    def __init__(self, start: Callable[[Iterator[Message]], _Responses], path: str) -> None:
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._responses = start(iter(self._requests.get, None))
        self._path = path

    async def ask(self, request: content_pb2.WriteContentRequest) -> content_pb2.WriteContentResponse:
        self._requests.put(request)
        response = await trio.to_thread.run_sync(self._next, abandon_on_cancel=True)
        if response is None:
            raise UnreachableError(f"containerd ended a write without an answer: {self._path}")
        return response

    def _next(self) -> content_pb2.WriteContentResponse | None:
        try:
            return next(self._responses, None)
        except grpc.RpcError as error:
            raise _translate(error, self._path) from None

    def close(self) -> None:
        self._requests.put(None)
        self._responses.cancel()


class Writer:
    """A blob on its way into the content store."""

    def __init__(self, stream: _Stream, content: Content) -> None:
        self._stream = stream
        self._content = content
        self.offset = 0
        """Bytes that the store has."""

    async def begin(self) -> None:
        """Take the ref, and learn how much of the blob is there."""
        self.offset = (await self._stream.ask(self._request(content_pb2.STAT))).offset

    async def write(self, data: bytes) -> None:
        """Append."""
        self.offset = (await self._stream.ask(self._request(content_pb2.WRITE, data))).offset

    async def commit(self) -> None:
        """Have the store check size and digest, and keep it; raises CorruptError, ExistsError."""
        request = self._request(content_pb2.COMMIT)
        request.labels.update(self._content.labels)
        try:
            await self._stream.ask(request)
        except BusyError as error:
            raise CorruptError(f"not what its digest says: {self._content.digest}: {error.message}") from None

    def close(self) -> None:
        """Let go of the ref; what was written stays for the next attempt."""
        self._stream.close()

    def _request(self, action: content_pb2.WriteAction, data: bytes = b"") -> content_pb2.WriteContentRequest:
        return content_pb2.WriteContentRequest(
            action=action,
            ref=self._content.ref,
            total=self._content.size,
            expected=self._content.digest,
            offset=self.offset,
            data=data,
        )


@asynccontextmanager
async def open_containerd(path: str, namespace: str) -> AsyncIterator[Containerd]:
    """Connect to the containerd at the unix socket `path`; raises UnreachableError, DeniedError."""
    probe(path)
    channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
    try:
        yield Containerd(channel, path, namespace)
    finally:
        channel.close()


def _is_same_path(one: str, other: str) -> bool:
    """Also where one of them is by way of a symlink, as /var/run is."""
    return os.path.realpath(one) == os.path.realpath(other)


def _tell(token: trio.lowlevel.TrioToken, done: trio.Event) -> None:
    try:
        token.run_sync_soon(done.set)
    except trio.RunFinishedError:
        return


def _descriptor(descriptor: Descriptor) -> descriptor_pb2.Descriptor:
    return descriptor_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.notes,
    )


def _translate(error: grpc.RpcError, path: str) -> NsfsError:
    code, details = error.code().name, error.details() or "no details"
    if code == "UNAVAILABLE":
        return UnreachableError(f"containerd: {path}: {details[:2000]}")
    return ERRORS.get(code, NsfsError)(f"containerd: {details[:2000]}")
