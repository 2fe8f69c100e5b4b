"""The blocks of a model, one after another and round again: some stay in memory, others are read ahead of their use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from queue import Queue
from types import TracebackType

from sequoia.engine.offload.block import Block, Buffer, Tensors


@dataclass(slots=True)
class Passed:
    """What passes have taken so far."""

    num_passes: int = 0
    num_bytes: int = 0  # read from the slow tier
    read_seconds: float = 0.0  # in which the reader read
    pass_seconds: float = 0.0  # from a pass's beginning to its end
    stall_seconds: float = 0.0  # of these, in which the one who computes waited for a block

    def __str__(self) -> str:
        rate = self.num_bytes / self.read_seconds / 1e9 if self.read_seconds else 0.0
        read = f"{self.num_passes} forwards, {self.num_bytes / 1e9:.1f} GB read in {self.read_seconds:.1f} s"
        return f"{read} ({rate:.2f} GB/s); of {self.pass_seconds:.1f} s they waited {self.stall_seconds:.1f}"


class BlockStream:
    """Passes over a model's blocks. A context manager: leaving it ends the reader and closes the files.

    `num_resident` blocks, spread evenly, are kept; the others share `num_buffers` buffers. Reading goes on from the
    end of a pass into the next one, so that what computes between passes costs no time.
    """

    def __init__(self, blocks: Sequence[Block], *, num_resident: int, num_buffers: int = 3) -> None:
        count = len(blocks)
        stays = [index * num_resident // count < (index + 1) * num_resident // count for index in range(count)]
        self.passed = Passed()
        self._blocks = blocks
        self._resident = {index: blocks[index].read(Buffer(blocks[index].num_bytes)) for index in _where(stays)}
        self._streamed = [block for block, is_kept in zip(blocks, stays, strict=True) if not is_kept]
        largest = max((block.num_bytes for block in self._streamed), default=0)
        self._buffers = [Buffer(largest) for _ in range(min(num_buffers, len(self._streamed)))]
        self._reader = self._read()
        self._is_between_passes = True

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return len(self._blocks)

    @property
    def num_resident(self) -> int:
        """Of these, in memory for good."""
        return len(self._resident)

    def __str__(self) -> str:
        place = "past the page cache" if all(block.is_direct for block in self._blocks) else "through the page cache"
        return f"{self.num_resident} of {self.num_blocks} layers in memory, others read {place}: {self.passed}"

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.stop()
        for block in self._blocks:
            block.close()

    def blocks(self) -> Iterator[Tensors]:
        """One pass: every block's tensors, good until the next ones are asked for.

        Raises what Block.read raises. A pass that does not come to its end costs what was read ahead, no more; the next
        one ends it.
        """
        if not self._is_between_passes:
            self._reader.stop()
            self._reader = self._read()
        self._is_between_passes = False
        begun = time.perf_counter()
        for index in range(len(self._blocks)):
            if index in self._resident:
                yield self._resident[index]
                continue
            started = time.perf_counter()
            read = self._reader.next()
            self.passed.stall_seconds += time.perf_counter() - started
            yield read.tensors
            self._reader.release(read)
        self.passed.num_passes += 1
        self.passed.pass_seconds += time.perf_counter() - begun
        self._is_between_passes = True

    def _read(self) -> _Reader:
        return _Reader(self._streamed, self._buffers, self.passed)


@dataclass(frozen=True, slots=True)
class _Read:
    """A block that is in memory."""

    tensors: Tensors
    buffer: Buffer


class _Reader:
    """The thread that reads: round and round, as far ahead as there are buffers."""

    def __init__(self, blocks: Sequence[Block], buffers: Sequence[Buffer], passed: Passed) -> None:
        self._blocks, self._passed = blocks, passed
        self._free: Queue[Buffer | None] = Queue()
        self._ready: Queue[_Read | Exception] = Queue()
        for buffer in buffers:
            self._free.put(buffer)
        self._thread = threading.Thread(target=self._run, name="offload", daemon=True)
        self._thread.start()

    def next(self) -> _Read:
        """The next block, when it is there."""
        found = self._ready.get()
        if isinstance(found, Exception):
            raise found
        return found

    def release(self, read: _Read) -> None:
        """Its buffer may be read into."""
        self._free.put(read.buffer)

    def stop(self) -> None:
        """End the thread; the buffers are nobody's then."""
        self._free.queue.clear()
        self._free.put(None)
        self._thread.join()

    def _run(self) -> None:
        for block in cycle(self._blocks):
            buffer = self._free.get()
            if buffer is None:
                return
            started = time.perf_counter()
            try:
                tensors = block.read(buffer)
            except Exception as error:  # noqa: BLE001 - it belongs to the one who computes
                self._ready.put(error)
                return
            self._passed.read_seconds += time.perf_counter() - started
            self._passed.num_bytes += block.num_bytes
            self._ready.put(_Read(tensors, buffer))


def _where(flags: Sequence[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]
