"""The blocks of a model, one after another and round again: some stay in memory, others are read ahead of their use."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import cycle
from queue import Queue
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from sequoia.engine.offload.block import Tensors


class AnyBuffer(Protocol):
    """Fast memory."""

    def release(self) -> None:
        """It may be read into again."""
        ...


B = TypeVar("B", bound=AnyBuffer)


class AnyBlock(Protocol[B]):
    """A part of a model on a slow tier."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def place(self) -> str:
        """Where it is, in words."""
        ...

    def buffer(self, num_bytes: int) -> B:
        """For blocks like this one, of at most so many bytes."""
        ...

    def read(self, buffer: B) -> Tensors:
        """Its tensors, good until the buffer is read into again."""
        ...

    def close(self) -> None:
        """No read comes after."""
        ...


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


class BlockStream(Generic[B]):
    """Passes over a model's blocks. A context manager: leaving it ends the reader and closes the files.

    `num_resident` blocks, spread evenly, are kept; the others share `num_buffers` buffers. Reading goes on from the
    end of a pass into the next one, so that what computes between passes costs no time.
    """

    def __init__(self, blocks: Sequence[AnyBlock[B]], *, num_resident: int, num_buffers: int = 3) -> None:
        count = len(blocks)
        stays = [index * num_resident // count < (index + 1) * num_resident // count for index in range(count)]
        self.passed = Passed()
        self._blocks = blocks
        self._resident = {index: _kept(blocks[index]) for index in _where(stays)}
        self._streamed = [block for block, is_kept in zip(blocks, stays, strict=True) if not is_kept]
        largest = max((block.num_bytes for block in self._streamed), default=0)
        self._buffers = [each.buffer(largest) for each in self._streamed[:num_buffers]]
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

    @property
    def is_resident(self) -> bool:
        """Whether nothing is streamed."""
        return not self._streamed

    def __str__(self) -> str:
        places = " and ".join(sorted({block.place for block in self._streamed}))
        others = f", others {places}: {self.passed}" if places else ""
        return f"{self.num_resident} of {self.num_blocks} layers in memory{others}"

    def __enter__(self) -> BlockStream[B]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.stop()
        for block in self._streamed:
            block.close()

    def blocks(self) -> Generator[Tensors]:
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

    def _read(self) -> _Reader[B]:
        return _Reader(self._streamed, self._buffers, self.passed)


@dataclass(frozen=True, slots=True)
class _Read(Generic[B]):
    """A block that is in memory."""

    tensors: Tensors
    buffer: B


class _Reader(Generic[B]):
    """The thread that reads: round and round, as far ahead as there are buffers."""

    def __init__(self, blocks: Sequence[AnyBlock[B]], buffers: Sequence[B], passed: Passed) -> None:
        self._blocks, self._passed = blocks, passed
        self._free: Queue[B | None] = Queue()
        self._ready: Queue[_Read[B] | Exception] = Queue()
        for buffer in buffers:
            self._free.put(buffer)
        self._thread = threading.Thread(target=self._run, name="offload", daemon=True)
        self._thread.start()

    def next(self) -> _Read[B]:
        """The next block, when it is there."""
        found = self._ready.get()
        if isinstance(found, Exception):
            raise found
        return found

    def release(self, read: _Read[B]) -> None:
        """Its buffer may be read into."""
        read.buffer.release()
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


def _kept(block: AnyBlock[B]) -> Tensors:
    """In memory for good, and only there."""
    tensors = block.read(block.buffer(block.num_bytes))
    block.close()
    return tensors


def _where(flags: Sequence[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]
