"""Small arrays to the device and back: one copy there that nobody waits for, one back that is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What fits every element type: views of the packed bytes begin at multiples of it.
_ALIGNMENT = 8
_TORCH = {"int64": torch.int64, "float64": torch.float64, "float32": torch.float32, "bool": torch.bool}

Array = NDArray[Any]


def staged(arrays: Sequence[Array], device: torch.device) -> Tensor:
    """The bytes of the arrays, one behind the other, (bytes,) uint8 on the host; pinned for a CUDA device.

    Out of memory that is not pinned a copy waits for all work before it.
    """
    starts = _starts([array.nbytes for array in arrays])
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    numbers = staging.numpy()
    for array, start in zip(arrays, starts, strict=False):
        numbers[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return staging


def unpacked(buffer: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Views of `staged` bytes, wherever they were copied to, in the shapes and dtypes of the arrays."""
    starts = _starts([array.nbytes for array in arrays])
    return [
        buffer[start : start + array.nbytes].view(_TORCH[array.dtype.name]).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays (int64, float64, float32 or bool) as tensors on the device, by one copy that nobody waits for.

    On the CPU they share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)).view(array.shape) for array in arrays]
    return unpacked(staged(arrays, device).to(device, non_blocking=True), arrays)


def download(tensors: Sequence[Tensor]) -> list[Array]:
    """The tensors as arrays on the host. The one place where the host waits for the device: once a call."""
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]).cpu().numpy()
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    names = {kind: name for name, kind in _TORCH.items()}
    return [
        part.view(names[tensor.dtype]).reshape(tuple(tensor.shape)) for part, tensor in zip(parts, tensors, strict=True)
    ]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each array's bytes begin, and the end of the last."""
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    return [0, *(int(end) for end in np.cumsum(padded))]
