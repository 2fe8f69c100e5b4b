"""What a slow tier gives to whoever only reads: a disk its files from end to end, the host's memory to a device."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

_READ_BYTES = 8 << 20
_COPY_BYTES, _NUM_COPIES = 256 << 20, 4


class RawDisk:
    """Reads some files whole, one read after the other, past the page cache where the file system has direct reads."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._memory = mmap.mmap(-1, _READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A disk of 3.9 GB/s gave 1.3 to small pages, which the kernel pins one by one.
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    def bytes_per_second(self) -> float:
        """Of all files, one after the other."""
        started, total = time.perf_counter(), 0
        for path in self._files:
            total += self._read(path)
        return total / (time.perf_counter() - started)

    def _read(self, path: Path) -> int:
        file, position = _open(path), 0
        try:
            while count := os.preadv(file, [self._memory], position):
                position += count
        finally:
            os.close(file)
        return position


class RawCopy:
    """Copies pinned memory to a device, over and over. Never run on CUDA; on the CPU a copy in memory."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._target = torch.empty_like(self._source, device=self._device)

    def bytes_per_second(self) -> float:
        """Of some copies, one after the other."""
        started = time.perf_counter()
        for _ in range(_NUM_COPIES):
            self._target.copy_(self._source)  # waits for the device
        return _NUM_COPIES * _COPY_BYTES / (time.perf_counter() - started)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(path, os.O_RDONLY)
