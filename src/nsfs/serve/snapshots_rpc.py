"""containerd's snapshots API as a gRPC service: translates messages and statuses; decides nothing.

The service is `containerd.services.snapshots.v1.Snapshots` (containerd 1.6 to 2.x). The namespace of a call is the
first `containerd-namespace` of its metadata: containerd 2.1 sends it, newest first where several components add theirs;
1.6 sends none, and neither does any version's garbage collection.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, TypeAlias

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from nsfs.core.snapshots import Caller
from nsfs.errors import NsfsError
from nsfs.model.snapshot import Kind
from nsfs.serve.proto import mount_pb2
from nsfs.serve.proto import snapshots_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from google.protobuf.message import Message

    from nsfs.core.snapshots import Snapshots
    from nsfs.model.snapshot import Mount, Record
    from nsfs.serve.rpc import Bridge

    Context: TypeAlias = grpc.ServicerContext

log = logging.getLogger(__name__)

SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"
_NAMESPACE: Final = "containerd-namespace"
_BATCH: Final = 100
"""Records in one message of List, as containerd's own service sends them."""


def snapshots_service(snapshots: Snapshots) -> Callable[[Bridge], grpc.GenericRpcHandler]:
    """The service, for `serve.rpc.serve_rpc`."""

    def bind(bridge: Bridge) -> grpc.GenericRpcHandler:
        servicer = _Servicer(snapshots, bridge)
        return grpc.method_handlers_generic_handler(SERVICE, servicer.handlers())

    return bind


class _Named(Protocol):
    """Every request says through which plugin it comes."""

    snapshotter: str


class _Servicer:
    def __init__(self, snapshots: Snapshots, bridge: Bridge) -> None:
        self._snapshots = snapshots
        self._bridge = bridge

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Message, Message]]:
        unary: dict[str, tuple[Callable[..., Message], type[Message]]] = {
            "Prepare": (self._prepare, pb.PrepareSnapshotRequest),
            "View": (self._view, pb.ViewSnapshotRequest),
            "Mounts": (self._mounts, pb.MountsRequest),
            "Commit": (self._commit, pb.CommitSnapshotRequest),
            "Remove": (self._remove, pb.RemoveSnapshotRequest),
            "Stat": (self._stat, pb.StatSnapshotRequest),
            "Update": (self._update, pb.UpdateSnapshotRequest),
            "Usage": (self._usage, pb.UsageRequest),
            "Cleanup": (self._cleanup, pb.CleanupRequest),
        }
        handlers = {name: _unary(behaviour, request) for name, (behaviour, request) in unary.items()}
        handlers["List"] = grpc.unary_stream_rpc_method_handler(
            _streaming(self._list), pb.ListSnapshotsRequest.FromString, pb.ListSnapshotsResponse.SerializeToString
        )
        return handlers

    def _prepare(self, request: pb.PrepareSnapshotRequest, context: Context) -> Message:
        return pb.PrepareSnapshotResponse(mounts=self._create(Kind.ACTIVE, request, context))

    def _view(self, request: pb.ViewSnapshotRequest, context: Context) -> Message:
        return pb.ViewSnapshotResponse(mounts=self._create(Kind.VIEW, request, context))

    def _create(
        self, kind: Kind, request: pb.PrepareSnapshotRequest | pb.ViewSnapshotRequest, context: Context
    ) -> list[mount_pb2.Mount]:
        caller, labels = _caller(request, context), dict(request.labels)

        async def create() -> list[Mount]:
            return await self._snapshots.create(caller, kind, request.key, request.parent, labels)

        return _mounts(self._bridge.wait(create, context))

    def _mounts(self, request: pb.MountsRequest, context: Context) -> Message:
        async def mounts() -> list[Mount]:
            return await self._snapshots.mounts(_caller(request, context), request.key)

        return pb.MountsResponse(mounts=_mounts(self._bridge.wait(mounts, context)))

    def _commit(self, request: pb.CommitSnapshotRequest, context: Context) -> Message:
        caller, labels = _caller(request, context), dict(request.labels)

        async def commit() -> None:
            await self._snapshots.commit(caller, request.name, request.key, request.parent, labels)

        self._bridge.call(commit, context)
        return Empty()

    def _remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> Message:
        async def remove() -> None:
            await self._snapshots.remove(_caller(request, context), request.key)

        self._bridge.call(remove, context)
        return Empty()

    def _stat(self, request: pb.StatSnapshotRequest, context: Context) -> Message:
        async def stat() -> Record:
            return self._snapshots.stat(_caller(request, context), request.key)

        return pb.StatSnapshotResponse(info=_info(self._bridge.call(stat, context)))

    def _update(self, request: pb.UpdateSnapshotRequest, context: Context) -> Message:
        caller, labels, paths = _caller(request, context), dict(request.info.labels), list(request.update_mask.paths)

        async def update() -> Record:
            return await self._snapshots.update(caller, request.info.name, labels, paths)

        return pb.UpdateSnapshotResponse(info=_info(self._bridge.call(update, context)))

    def _list(self, request: pb.ListSnapshotsRequest, context: Context) -> Iterator[Message]:
        async def find() -> list[Record]:
            return self._snapshots.select(_caller(request, context), list(request.filters))

        for batch in _batches(self._bridge.call(find, context)):
            yield pb.ListSnapshotsResponse(info=[_info(record) for record in batch])

    def _usage(self, request: pb.UsageRequest, context: Context) -> Message:
        async def usage() -> pb.UsageResponse:
            found = await self._snapshots.usage(_caller(request, context), request.key)
            return pb.UsageResponse(size=found.size, inodes=found.inodes)

        return self._bridge.wait(usage, context)

    def _cleanup(self, _request: pb.CleanupRequest, context: Context) -> Message:
        async def cleanup() -> Empty:
            await self._snapshots.cleanup()
            return Empty()

        return self._bridge.wait(cleanup, context)


def _caller(request: _Named, context: Context) -> Caller:
    given = [value for name, value in context.invocation_metadata() if name == _NAMESPACE]
    return Caller(request.snapshotter, str(given[0]) if given else None)


def _mounts(mounts: Iterable[Mount]) -> list[mount_pb2.Mount]:
    return [mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def _info(record: Record) -> pb.Info:
    return pb.Info(
        name=record.name,
        parent=record.parent,
        kind=pb.Kind.Name(record.kind),
        created_at=_timestamp(record.created),
        updated_at=_timestamp(record.updated),
        labels=record.labels,
    )


def _timestamp(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def _batches(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    for start in range(0, len(records), _BATCH):
        yield records[start : start + _BATCH]


def _unary(behaviour: Callable[..., Message], request: type[Message]) -> grpc.RpcMethodHandler[Message, Message]:
    def serve(message: Message, context: Context) -> Message:
        try:
            return behaviour(message, context)
        except Exception as error:  # noqa: BLE001  every failure is the client's to hear, as a status
            _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(serve, request.FromString, lambda message: message.SerializeToString())


def _streaming(behaviour: Callable[..., Iterator[Message]]) -> Callable[[Message, Context], Iterator[Message]]:
    def serve(message: Message, context: Context) -> Iterator[Message]:
        try:
            yield from behaviour(message, context)
        except Exception as error:  # noqa: BLE001  as above
            _abort(context, error)

    return serve


def _abort(context: Context, error: Exception) -> NoReturn:
    if isinstance(error, NsfsError):
        hint = f" ({error.hint})" if error.hint else ""
        context.abort(grpc.StatusCode[error.code], error.message + hint)
    log.error("a snapshots call failed", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
