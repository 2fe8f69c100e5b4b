"""A server of this system as a child process: started, waited for, stopped, and never left behind."""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sequoia
from sequoia.errors import Unavailable

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 10.0
_NUM_TAIL_LINES = 12
# Loaded here, because between fork and exec only the call itself is safe.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ServerProcess:
    """`python -m MODULE FLAGS`, from its start to its end. It dies with this process, even when that one is killed.

    It is in a process group of its own, so that Ctrl-C reaches only us and we choose the order of the stops. Its
    stderr goes to LOG_DIR/NAME.log. `cores` pin it, before it has threads; none: it may run anywhere. Start it from the
    main thread: the parent's death is that of the starting thread.
    """

    def __init__(
        self,
        name: str,
        module: str,
        flags: Mapping[str, object],
        environment: Mapping[str, str],
        log_dir: Path,
        cores: Collection[int] = (),
        service: str = "",
    ) -> None:
        self.name, self.service = name, service
        self.address = ""
        self.log_path = log_dir / f"{name}.log"
        arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        with self.log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,  # so that a line read ahead never hides from select()
                env={**environment, "PYTHONPATH": _import_path(environment)},
                preexec_fn=die_with_parent(os.getpid(), cores),
                process_group=0,
            )
        assert self._popen.stdout is not None
        self.stdout = self._popen.stdout

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._popen.kill()
        self._popen.wait()

    def terminate(self) -> None:
        """Ask it to stop."""
        self._popen.terminate()

    def wait(self) -> None:
        """Wait until it has stopped; kill it when it takes too long."""
        try:
            self._popen.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self.stdout.close()

    def obituary(self) -> str:
        """How it ended, with the end of its log."""
        status = self._popen.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        lines = self.log_path.read_text(errors="replace").splitlines()[-_NUM_TAIL_LINES:]
        return "\n  ".join([f"the {self.name} process {how}; the end of {self.log_path}:", *lines])


def wait_until_serving(
    processes: Sequence[ServerProcess], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[ServerProcess]:
    """Yield each process when it serves, its address filled in; `on_progress` hears how far a long preparation is.

    Raises Unavailable when a process ends instead.
    """
    waiting = set(processes)
    for process, line in _lines(processes):
        if not line:
            raise Unavailable(process.obituary())
        event = _event(line)
        if event.get("event") == "progress":
            on_progress(event["done"], event["total"])
        elif event.get("event") == "serving" and process.service in ("", event.get("service")):
            process.address = event["address"]
            waiting.discard(process)
            yield process
        if not waiting:
            return


def wait_for_end(processes: Sequence[ServerProcess]) -> Iterator[ServerProcess]:
    """Yield each process when it has ended, in the order of the ends."""
    return (process for process, line in _lines(processes) if not line)


def stop(processes: Sequence[ServerProcess]) -> None:
    """Stop them, all at a time."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _lines(processes: Sequence[ServerProcess]) -> Iterator[tuple[ServerProcess, bytes]]:
    """The lines of all stdouts as they come; an empty one when a process has ended."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.stdout, selectors.EVENT_READ, process)
        while selector.get_map():
            for key, _ in selector.select():
                line = key.data.stdout.readline()
                if not line:
                    selector.unregister(key.fileobj)
                yield key.data, line


def _event(line: bytes) -> dict[str, Any]:
    """What a server tells in a line; nothing where the line is somebody else's."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _import_path(environment: Mapping[str, str]) -> str:
    """The child imports the packages that we are part of, and none that happen to lie in the current folder."""
    ours = str(Path(sequoia.__file__).parent.parent)
    return os.pathsep.join(filter(None, [ours, environment.get("PYTHONPATH")]))


def die_with_parent(parent_pid: int, cores: Collection[int] = ()) -> Callable[[], None] | None:
    """What the child does between fork and exec (Linux): keep to its cores, ask for SIGKILL when its parent dies."""
    if _libc is None:
        return None
    prctl = _libc.prctl

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)

    return prepare
