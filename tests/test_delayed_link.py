import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sequoia.cli.delayed_link import DelayedLink

SECONDS = 0.2


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_round_trip_takes_that_much_longer_and_loses_nothing(echo: str) -> None:
    async with DelayedLink(echo, SECONDS) as link, asyncio.timeout(20):
        host, port = link.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        started = time.monotonic()
        writer.write(b"a" * 100_000)
        assert await reader.readexactly(100_000) == b"a" * 100_000
        assert time.monotonic() - started >= SECONDS
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


async def test_leaving_ends_what_is_still_connected(echo: str) -> None:
    async with asyncio.timeout(20):
        async with DelayedLink(echo, SECONDS) as link:
            host, port = link.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"b")
            await reader.readexactly(1)
        assert await reader.read() == b""
        writer.close()


async def test_the_far_end_may_be_a_unix_socket(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_unix_server(greet, tmp_path / "far")
    async with asyncio.timeout(20), server, DelayedLink(f"unix:{tmp_path}/far", 0.0) as link:
        host, port = link.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b"hello"
        writer.close()
