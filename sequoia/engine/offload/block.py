"""A part of a model on disk, a safetensors file by itself, and how it is read past the page cache."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sequoia.errors import FailedPrecondition, Unavailable

Tensors = Mapping[str, Tensor]

# What direct reads must be multiples of: offsets, lengths, and the buffer's address.
_ALIGNMENT = 4096
# Of one read: large enough for the disk's full rate, small enough to stop soon.
_READ_BYTES = 8 << 20
_HEADER = 8  # bytes of the length of a safetensors file's header
# Where tensors begin: else every vector of weights would lie in two lines.
CACHE_LINE = 64
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_GAP = "gap."  # what fills the space between tensors: the format allows no holes


def write_block(path: Path, tensors: Tensors) -> None:
    """A safetensors file of contiguous tensors, each of them aligned. Raises OSError."""
    header: dict[str, object] = {}
    parts: list[Tensor] = []
    end = 0
    for name, tensor in tensors.items():
        gap = torch.zeros(-end % CACHE_LINE, dtype=torch.uint8)
        for part_name, part in ((f"{_GAP}{name}", gap), (name, tensor)):
            if part.numel():
                offsets = [end, end := end + part.nbytes]
                shape = list(part.shape)
                header[part_name] = {"dtype": _DTYPES[part.dtype], "shape": shape, "data_offsets": offsets}
                parts.append(part)
    text = json.dumps(header).encode()
    text += b" " * (padded(_HEADER + len(text)) - _HEADER - len(text))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_HEADER, "little") + text)
        for part in parts:
            file.write(part.flatten().view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


class Buffer:
    """Memory that one block after another is read into: (num_bytes,) in whole pages, huge ones where there are."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = mmap.mmap(-1, padded(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def release(self) -> None:
        """Nobody reads it any more: on the CPU who computes has then computed."""


class Block:
    """One file, open for direct reads (through the page cache where the file system has no other).

    Raises FailedPrecondition naming `offload` for what is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        try:
            self._file, self.is_direct = _open(path)
            self._seen = self._state()
            self._describe()
        except (OSError, SafetensorError) as error:
            raise FailedPrecondition(f"{path} cannot be read: {error}; remove its folder", "offload") from error

    @property
    def place(self) -> str:
        """Where reads come from, in words."""
        return f"read {'past' if self.is_direct else 'through'} the page cache"

    def buffer(self, num_bytes: int) -> Buffer:
        """For blocks of at most so many bytes."""
        return Buffer(num_bytes)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._seen[0]

    def close(self) -> None:
        """No read comes after. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, buffer: Buffer) -> Tensors:
        """Its tensors, views of the buffer that are good until it is read into again.

        Raises Unavailable naming `offload` when the file fails, or is not what it was when it was opened.
        """
        try:
            if self._state() != self._seen:
                raise Unavailable(f"{self._path} was changed while it was in use; start the worker again", "offload")
            position = 0
            while position < self.num_bytes:
                end = min(position + _READ_BYTES, padded(self.num_bytes))
                count = os.preadv(self._file, [buffer.view[position:end]], position)
                if not count:
                    raise Unavailable(f"{self._path} ends at byte {position} of {self.num_bytes}", "offload")
                position += count
        except OSError as error:
            raise Unavailable(f"{self._path} cannot be read: {error}", "offload") from error
        return {name: view(buffer.bytes, *place) for name, place in self._places.items()}

    def _state(self) -> tuple[int, int, int]:
        """What changes with the file."""
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns, found.st_nlink

    def _describe(self) -> None:
        """Where its tensors are."""
        with self._path.open("rb") as file:
            start = _HEADER + int.from_bytes(file.read(_HEADER), "little")
        with safe_open(self._path, "pt") as file:
            for name in file.offset_keys():
                tensor = file.get_tensor(name)
                if not name.startswith(_GAP):
                    self._places[name] = (tensor.dtype, tuple(tensor.shape), start)
                start += tensor.nbytes


def padded(num_bytes: int) -> int:
    """The next multiple of what direct reads want."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _open(path: Path) -> tuple[int, bool]:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, os.O_RDONLY | direct), bool(direct)
    except OSError:
        return os.open(path, os.O_RDONLY), False


def view(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """A tensor in memory of bytes, from that one on."""
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return memory[start : start + num_bytes].view(dtype).view(shape)
