"""A peer as a child process: JSON lines to its stdin and from its stdout (peers/peer_protocol.py tells which)."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sequoia.cli.process import die_with_parent

_GRACE_SECONDS = 5.0
_CHUNK_BYTES = 65536
_NUM_TAIL_CHARACTERS = 300


class PeerFailed(Exception):
    """A peer could not be had, or is gone; the benchmark goes on without it."""


class PeerProcess:
    """From `with` to its end. It dies with this process; its stderr goes to `log_path`. Start it in the main thread."""

    def __init__(self, python: Path, script: Path, environment: Mapping[str, str], log_path: Path) -> None:
        self._command = [str(python), str(script)]
        self._environment = environment
        self._log_path = log_path
        self._unread = b""

    def __enter__(self) -> PeerProcess:
        with self._log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env=self._environment,
                preexec_fn=die_with_parent(os.getpid()),
                process_group=0,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
        self._popen.stdout.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def ask(self, message: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Its answer. Raises PeerFailed when it says that it cannot, ends, or takes too long."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError as error:
            raise PeerFailed(self._obituary()) from error
        line = self._line(time.monotonic() + timeout_seconds)
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise PeerFailed(f"answered {line[:80]!r}, which is not JSON") from error
        if "error" in answer:
            raise PeerFailed(" ".join(answer["error"].split()))
        return answer

    def _line(self, deadline: float) -> bytes:
        assert self._popen.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._popen.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(deadline - time.monotonic()):
                    raise PeerFailed("did not answer in time")
                chunk = os.read(self._popen.stdout.fileno(), _CHUNK_BYTES)
                if not chunk:
                    raise PeerFailed(self._obituary())
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _obituary(self) -> str:
        try:
            status = self._popen.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        tail = self._log_path.read_text(errors="replace").strip()[-_NUM_TAIL_CHARACTERS:]
        return f"the process {how}: {tail}" if tail else f"the process {how}"
