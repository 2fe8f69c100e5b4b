"""A link that fails when it is told to: cut, reset, stalled, half a message, bytes twice."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

_CHUNK_BYTES = 65536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST


class FaultyLink:
    """Passes on what arrives at `address` to a worker and back, on a thread of its own. A context manager."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._spoil: Callable[[bytes], bytes] | None = None
        self.address = ""

    def __enter__(self) -> FaultyLink:
        self._thread.start()
        self.address = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self) -> None:
        """End all connections, as a peer does that leaves."""
        self._call(self._end)

    def reset(self) -> None:
        """Break all connections, as a firewall does."""
        self._call(lambda: self._end(linger=_RESET))

    def stall(self, seconds: float) -> None:
        """Let nothing through for a while."""

        def stop() -> None:
            self._flowing.clear()
            self._loop.call_later(seconds, self._flowing.set)

        self._call(stop)

    def halve(self) -> None:
        """Pass on half of the next bytes, then cut."""
        self._spoil_next(lambda data: data[: len(data) // 2])

    def repeat(self) -> None:
        """Pass on the next bytes twice, which no protocol can read, then cut."""
        self._spoil_next(lambda data: data + data)

    def _spoil_next(self, spoil: Callable[[bytes], bytes]) -> None:
        self._spoil = spoil

    def _call(self, function: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(10)

    def _end(self, linger: bytes | None = None) -> None:
        for writer in self._writers:
            if linger is not None:
                with suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort() if linger is not None else writer.close()
        self._writers.clear()

    async def _leave(self) -> None:
        self._end()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _listen(self) -> str:
        self._flowing.set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            writer.close()
            return
        self._writers |= {writer, there_writer}
        with suppress(asyncio.CancelledError):
            await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))
        self._writers -= {writer, there_writer}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._flowing.wait()
                spoil, self._spoil = self._spoil, None
                writer.write(spoil(data) if spoil else data)
                await writer.drain()
                if spoil:
                    break
        writer.close()
