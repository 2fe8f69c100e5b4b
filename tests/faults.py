"""What can happen to the processes of a cluster and to the links between them, for tests/chaos.py."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Queue

from clocks import CAN_JUMP, Clocks
from cluster import Cluster

_LINK_FAULTS = ("cut", "reset", "halve", "repeat", "stall")
_STALL_SECONDS, _PAUSE_SECONDS = 0.7, 0.5
_FURTHEST_JUMP_SECONDS = 86_400


class Faults:
    """For any thread, each by its name; `restart_ended` brings those back that have ended, as an orchestrator does."""

    def __init__(self, cluster: Cluster, clocks: Clocks) -> None:
        self._cluster, self._clocks, self._lock = cluster, clocks, threading.Lock()
        self._ended: Queue[str] = Queue()
        self._processes: dict[str, Callable[[str, random.Random], None]] = {
            "kill": lambda worker, _: self._end(worker, self._cluster.kill),
            "terminate": lambda worker, _: self._end(worker, self._terminate),
            "pause": lambda worker, _: self._pause(worker),
            **({"jump": self._jump} if CAN_JUMP else {}),
        }

    @property
    def names(self) -> list[str]:
        """Of all that can happen on this machine."""
        return [*_LINK_FAULTS, *self._processes]

    def happen(self, name: str, worker: str, choose: random.Random) -> None:
        """To a process or its link, where that is there."""
        if name in self._processes:
            with self._lock:
                self._processes[name](worker, choose)
        elif name == "stall":
            self._cluster.links[worker].stall(_STALL_SECONDS)
        else:
            getattr(self._cluster.links[worker], name)()

    def restart_ended(self) -> None:
        """On the main thread: a process dies with the thread that started it."""
        with suppress(Empty):
            while True:
                self._cluster.begin(self._ended.get(timeout=0.05))

    def _end(self, worker: str, end: Callable[[str], None]) -> None:
        needed = self._cluster.names("coordinator") if worker.startswith("coordinator") else [worker]
        if all(map(self._cluster.is_serving, needed)):
            end(worker)
            self._ended.put(worker)
        # Else it has not come back from the last time; and without a coordinator nobody is there to ask.

    def _terminate(self, worker: str) -> None:
        self._cluster.terminate(worker)
        self._cluster.wait(worker)

    def _pause(self, worker: str) -> None:
        if self._cluster.is_serving(worker):
            self._cluster.signal(worker, signal.SIGSTOP)
            time.sleep(_PAUSE_SECONDS)
            self._cluster.signal(worker, signal.SIGCONT)

    def _jump(self, worker: str, choose: random.Random) -> None:
        """The wall clock alone, as where it is set; it stays there."""
        self._clocks.jump(worker, choose.randint(-_FURTHEST_JUMP_SECONDS, _FURTHEST_JUMP_SECONDS))
