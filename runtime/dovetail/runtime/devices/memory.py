"""Memory of a device by its addresses, as CUDA gives it, and blocks of arrays in it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dovetail.runtime.errors import DeviceError
from dovetail.runtime.system.arrays import Array, Bytes, Spec, nbytes

ALIGNMENT = 256  # bytes, of each array in a block, as in cudaMalloc


class Device(Protocol):
    """A device for captured graphs. All methods except `close` raise DeviceError."""

    kind: str  # ONNX Runtime's name for the memory
    provider: str  # the execution provider of the device

    def provider_options(self, arena: int | None, *, capture: bool = True) -> dict[str, str]:
        """Return options to capture, to use the stream, and to limit the arena to `arena` bytes."""

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes of zeros."""

    def clear(self, address: int, size: int) -> None:
        """Queue `size` bytes of zeros to an allocated address."""

    def pinned(self, size: int) -> Bytes:
        """Return `size` bytes of zeros on the host."""

    def upload(self, to: int, source: Bytes) -> None:
        """Queue a copy of pinned bytes to the address `to`."""

    def download(self, to: Bytes, source: int) -> None:
        """Queue a copy from the address `source` to pinned bytes."""

    def wait(self) -> None:
        """Wait until all queued work is done."""

    def close(self) -> None:
        """Free all memory and the stream."""


@dataclass(frozen=True)
class Block:
    """Arrays side by side, on the device and on the host."""

    specs: Mapping[str, Spec]
    offsets: Mapping[str, int]  # bytes
    address: int  # on the device
    host: Bytes

    @classmethod
    def allocate(cls, device: Device, specs: Mapping[str, Spec]) -> Block:
        offsets, size = {}, 0
        for name, spec in specs.items():
            offsets[name] = size
            size += -(-nbytes(spec) // ALIGNMENT) * ALIGNMENT
        return cls(specs, offsets, device.allocate(size), device.pinned(size))

    def array(self, name: str) -> Array:
        """Return the host's side of one array."""
        shape, dtype = self.specs[name]
        begin = self.offsets[name]
        return self.host[begin : begin + nbytes(self.specs[name])].view(dtype).reshape(shape)

    def bind(self, to: Any, name: str, kind: str) -> None:
        """Bind the device's side of one array as the graph's `name`."""
        shape, dtype = self.specs[name]
        to(name, kind, 0, dtype, shape, self.address + self.offsets[name])


def keep_on_failed(device: Device, *held: Any) -> bool:
    """Return whether the device failed. If so, keep `held` until the process ends.

    held: a session and its bindings. ONNX Runtime would end the process at once if it destroyed a
    captured graph on a failed device.
    """
    try:
        device.wait()
    except DeviceError:
        keep(*held)
        return True
    return False


def keep(*held: Any) -> None:
    """Keep objects until the process ends."""
    for kept in held:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
