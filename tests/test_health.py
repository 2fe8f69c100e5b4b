"""The health command of containers, against a real server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from sequoia.health import reached_at
from sequoia.rpc import Server


@pytest.fixture
async def server() -> AsyncIterator[str]:
    server = Server("127.0.0.1:0")
    yield await server.start([])
    await server.stop(0)


def status(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-m", "sequoia.health", *arguments]
    path = {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, env={**path, **environment}, check=False, timeout=60).returncode


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("0.0.0.0:50601", "localhost:50601"),
        ("[::]:50601", "localhost:50601"),
        ("10.0.0.7:50601", "10.0.0.7:50601"),
        ("unix:/run/a", "unix:/run/a"),
    ],
)
def test_a_server_is_asked_where_it_listens(listen: str, address: str) -> None:
    assert reached_at(listen) == address


async def test_one_that_serves_is_healthy(server: str) -> None:
    assert await asyncio.to_thread(status, server) == 0
    assert await asyncio.to_thread(status, SEQUOIA_LISTEN=server) == 0


def test_where_nobody_listens_is_not() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert status(f"127.0.0.1:{silent.getsockname()[1]}") == 1
