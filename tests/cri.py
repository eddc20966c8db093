"""What a kubelet asks of containerd about images, over the CRI (k8s.io/cri-api, runtime.v1), as far as tests need it.

The few messages are written and read field by field: a message is a list of (field number, bytes), nothing else occurs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

import grpc

if TYPE_CHECKING:
    from types import TracebackType


class Images:
    """The image service of the containerd at a socket."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_http_proxy", 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def pull(self, reference: str) -> str:
        """PullImage; gives the image's ID, which is its configuration's digest."""
        return _fields(self._ask("PullImage", _field(1, _field(1, reference.encode()))))[1][0].decode()

    def remove(self, reference: str) -> None:
        """RemoveImage."""
        self._ask("RemoveImage", _field(1, _field(1, reference.encode())))

    def names(self) -> set[str]:
        """The tags of ListImages."""
        listed = _fields(self._ask("ListImages", b"")).get(1, [])
        return {tag.decode() for image in listed for tag in _fields(image).get(2, [])}

    def wait_for(self, reference: str) -> None:
        """Until it is listed: the CRI hears of images by events."""
        deadline = time.monotonic() + 10
        while reference not in self.names():
            assert time.monotonic() < deadline, self.names()
            time.sleep(0.05)

    def _ask(self, method: str, request: bytes) -> bytes:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            f"/runtime.v1.ImageService/{method}"
        )
        return call(request, timeout=60)


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _fields(message: bytes) -> dict[int, list[bytes]]:
    """The length-delimited fields of a message (protobuf.dev, "Encoding"); numbers are skipped."""
    fields: dict[int, list[bytes]] = {}
    offset = 0
    while offset < len(message):
        key, offset = _read_varint(message, offset)
        value, offset = _read_varint(message, offset)
        if key & 7 == 2:
            fields.setdefault(key >> 3, []).append(message[offset : offset + value])
            offset += value
    return fields


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while data[offset] & 0x80:
        value |= (data[offset] & 0x7F) << shift
        shift += 7
        offset += 1
    return value | data[offset] << shift, offset + 1
