"""The C engine's working memory: allocated by the first forward of a size, and used again by those after it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_NAMES = ("residual", "wide", "narrow", "scores", "packed", "input_scales", "input_sums", "taken")
_CACHE_LINE = 16  # numbers of 4 bytes
_TILE_ROWS = 16  # as in linear.c


def packed_words(num_rows: int, inputs: int) -> int:
    """How many words of 4 bytes a linear layer's packed input takes: 2 bytes a value, in whole tiles of 16 rows."""
    return -(-num_rows // _TILE_ROWS) * _TILE_ROWS * inputs // 2


class ScratchAddresses(ctypes.Structure):
    """`Scratch` of decoder.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _NAMES)


class Scratch:
    """Buffers of 4-byte numbers by name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def residual(self, num_tokens: int, hidden: int) -> Tensor:
        """What the last forward left there, (num_tokens, hidden); good until the next one."""
        return self._buffers["residual"][: num_tokens * hidden].view(num_tokens, hidden)

    def room(self, *, taken: int, **sizes: int) -> ScratchAddresses:
        """At least so many numbers in each, and `taken` counters set to zero, each in a cache line of its own."""
        for name, size in (*sizes.items(), ("taken", taken * _CACHE_LINE)):
            if name not in self._buffers or self._buffers[name].numel() < size:
                self._buffers[name] = torch.empty(size)
        self._buffers["taken"].zero_()
        return ScratchAddresses(**{name: buffer.data_ptr() for name, buffer in self._buffers.items()})
