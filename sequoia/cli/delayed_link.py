"""A link that takes its time: what a worker on another machine is like, for benchmarks and tests on one."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

_CHUNK_BYTES = 65536


class DelayedLink:
    """Passes on what arrives at `address` to another one, and back, each way half of the round trip later.

    An async context manager. The order of bytes is kept, and so is the end of either side.
    """

    def __init__(self, target: str, round_trip_seconds: float) -> None:
        self._target, self._seconds = target, round_trip_seconds / 2
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._ends: list[asyncio.Event] = []

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> DelayedLink:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        for end in self._ends:
            await end.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = asyncio.Event()
        self._ends.append(end)
        try:
            there_reader, there_writer = await _connect(self._target)
            self._writers += (writer, there_writer)
            await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))
        finally:
            end.set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        writing = asyncio.create_task(self._write(queue, writer))
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                queue.put_nowait((asyncio.get_running_loop().time() + self._seconds, data))
        queue.put_nowait((0.0, b""))
        await writing

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                due, data = await queue.get()
                if not data:
                    break
                await asyncio.sleep(due - asyncio.get_running_loop().time())
                writer.write(data)
                await writer.drain()
        writer.close()


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await (asyncio.open_unix_connection(port) if host == "unix" else asyncio.open_connection(host, int(port)))
