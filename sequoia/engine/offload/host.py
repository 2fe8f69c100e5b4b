"""A part of a model in the host's memory, and how it comes to a device: copied beside what the device computes.

Nothing here has run on CUDA yet. On the CPU, where the tests run it, a copy is a copy and nobody waits for anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sequoia.engine.offload.block import CACHE_LINE, Tensors, view


class DeviceBuffer:
    """Memory of a device that one block after another is copied to, on a stream of its own: (num_bytes,)."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used: torch.cuda.Event | None = None

    def release(self) -> None:
        """What was started before may still read it; what comes into it comes after."""
        if self._copies is not None:
            self._used = torch.cuda.Event()
            self._used.record()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Around a copy: begins when nobody reads the buffer any more, ends when it is there."""
        if self._copies is None:
            yield
            return
        with torch.cuda.stream(self._copies):
            if self._used is not None:
                self._copies.wait_event(self._used)
            yield
        self._copies.synchronize()


class HostBlock:
    """Some tensors in one piece of memory, pinned where the device is not the host."""

    place = "from the host's memory"

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._device = device
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        end = 0
        for name, tensor in tensors.items():
            start = end + -end % CACHE_LINE
            self._places[name] = tensor.dtype, tuple(tensor.shape), start
            end = start + tensor.nbytes
        self.num_bytes = end
        self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for name, place in self._places.items():
            view(self._memory, *place).copy_(tensors[name])

    def buffer(self, num_bytes: int) -> DeviceBuffer:
        """On the device."""
        return DeviceBuffer(num_bytes, self._device)

    def close(self) -> None:
        """No read comes after: the host's memory is given back."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, buffer: DeviceBuffer) -> Tensors:
        """Its tensors on the device, views of the buffer that are good until it is read into again."""
        with buffer.copying():
            buffer.bytes[: self.num_bytes].copy_(self._memory, non_blocking=True)
        return {name: view(buffer.bytes, *place) for name, place in self._places.items()}
