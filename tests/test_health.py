"""The health command of containers, against a real server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from certificates import Authority

from sequoia.health import reached_at
from sequoia.rpc import Server
from sequoia.tls import Tls


@pytest.fixture
async def server() -> AsyncIterator[str]:
    server = Server("127.0.0.1:0")
    yield await server.start([])
    await server.stop(0)


def asked(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sequoia.health", *arguments]
    path = {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, env={**path, **environment}, capture_output=True, text=True, check=False, timeout=60)


def status(*arguments: str, **environment: str) -> int:
    return asked(*arguments, **environment).returncode


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def secured(authority: Authority) -> AsyncIterator[str]:
    """The port of one that lets in nobody without a certificate, and has one itself for localhost alone."""
    tls = Tls(*authority.issue("container", "sequoia-verify", "localhost"), ca=authority.path)
    server = Server("127.0.0.1:0", tls)
    address = await server.start([])
    yield address.rpartition(":")[2]
    await server.stop(0)


def variables(authority: Authority, pair: tuple[str, str] = ("", "")) -> dict[str, str]:
    """As a container has them."""
    files = {"SEQUOIA_TLS_CERT": pair[0], "SEQUOIA_TLS_KEY": pair[1], "SEQUOIA_TLS_CA": authority.path}
    return {name: path for name, path in files.items() if path}


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


async def test_one_with_tls_is_asked_with_the_containers_own_certificate(authority: Authority, secured: str) -> None:
    files = variables(authority, authority.issue("container", "sequoia-verify", "localhost"))
    assert await asyncio.to_thread(status, SEQUOIA_LISTEN=f"0.0.0.0:{secured}", **files) == 0
    assert await asyncio.to_thread(status, f"localhost:{secured}", **files) == 0


async def test_one_with_tls_is_not_healthy_for_who_cannot_tell(
    authority: Authority, secured: str, tmp_path: Path
) -> None:
    address, other = f"localhost:{secured}", Authority(tmp_path, "other")
    pair = authority.issue("container", "sequoia-verify", "localhost")
    for files in ({}, variables(authority), variables(other, pair)):
        assert await asyncio.to_thread(status, address, **files) == 1
    assert await asyncio.to_thread(status, f"127.0.0.1:{secured}", **variables(authority, pair)) == 1, "another name"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"SEQUOIA_TLS_CERT": "/a.crt"}, "SEQUOIA_TLS_KEY"),
        ({"SEQUOIA_TLS_CA": "/nowhere"}, "tls_ca: /nowhere has no certificates"),
        ({"SEQUOIA_LISTEN": "192.0.2.1:5"}, "give --tls-ca FILE"),
    ],
)
def test_what_is_no_setting_is_told_in_a_line(environment: dict[str, str], problem: str) -> None:
    found = asked(**environment)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert problem in found.stderr
