"""The control API as a gRPC service: translates between `serve.api` messages and async handlers; decides nothing.

gRPC runs in threads, handlers in trio. Each call pulls its events from a channel that the handler fills, so a client
that reads slowly slows its handler and nobody else. A client that goes away cancels its handler.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import msgspec
import trio
import trio.from_thread

from nsfs.errors import NsfsError, UnreachableError
from nsfs.serve import api

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from nsfs.serve.rpc import Bridge

    Report: TypeAlias = Callable[[Any], Awaitable[None]]
    Handler: TypeAlias = Callable[[Any, Report], Awaitable[msgspec.Struct]]

log = logging.getLogger(__name__)

_AHEAD = 16
"""Events a handler may be ahead of its client."""


class _Call:
    """One call: the trio task that runs the handler, and the channel that the gRPC thread drains."""

    def __init__(self, handler: Handler, request: msgspec.Struct) -> None:
        self._handler = handler
        self._request = request
        self._send, self._receive = trio.open_memory_channel[api.Event](_AHEAD)
        self._scope = trio.CancelScope()
        self.error: BaseException | None = None

    async def run(self) -> None:
        with self._scope:
            async with self._send:
                try:
                    result = await self._handler(self._request, self._send.send)
                    await self._send.send(api.Done(msgspec.msgpack.encode(result)))
                except trio.BrokenResourceError:
                    log.debug("a client went away")
                except Exception as error:  # noqa: BLE001  every failure is the client's to hear, as a status
                    self.error = error

    async def receive(self) -> api.Event | None:
        """The next event, or None at the end."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            return None

    def cancel(self) -> None:
        """End the handler; its client is gone."""
        self._scope.cancel()


class _Service(grpc.GenericRpcHandler):
    def __init__(self, handlers: dict[str, Handler], bridge: Bridge) -> None:
        self._handlers = handlers
        self._bridge = bridge

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        service, _, method = details.method.strip("/").rpartition("/")
        if service != api.SERVICE or method not in self._handlers:
            return None
        request_type, _ = api.METHODS[method]
        handler = self._handlers[method]

        def serve(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._serve(handler, request_type, data, context)

        return grpc.unary_stream_rpc_method_handler(serve)

    def _serve(
        self, handler: Handler, request_type: type[msgspec.Struct], data: bytes, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        try:
            request = msgspec.msgpack.decode(data, type=request_type)
        except msgspec.MsgspecError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, _failure("INVALID_ARGUMENT", f"malformed request: {error}"))
        call = _Call(handler, request)
        context.add_callback(lambda: self._bridge.soon(call.cancel))
        try:
            with self._bridge.patience():
                self._bridge.start(call.run)
                while (event := trio.from_thread.run(call.receive, trio_token=self._bridge.token)) is not None:
                    yield msgspec.msgpack.encode(event)
        except UnreachableError as error:
            call.error = error
        if call.error is not None:
            _abort(context, call.error)


def _failure(code: str, message: str, hint: str | None = None) -> str:
    return msgspec.json.encode(api.Failure(code=code, message=message, hint=hint)).decode()


def _abort(context: grpc.ServicerContext, error: BaseException) -> None:
    if isinstance(error, NsfsError):
        context.abort(grpc.StatusCode[error.code], _failure(error.code, error.message, error.hint))
    log.error("a control call failed", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, _failure("INTERNAL", f"{type(error).__name__}: {error}"))


def control_service(handlers: dict[str, Handler]) -> Callable[[Bridge], grpc.GenericRpcHandler]:
    """The service, for `serve.rpc.serve_rpc`."""
    return partial(_Service, handlers)
