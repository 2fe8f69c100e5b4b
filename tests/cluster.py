"""Several processes of each role, real ones, each behind a link that can fail."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
from clocks import Clocks
from faulty_link import FaultyLink
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sequoia.cli.process import ServerProcess, wait_until_serving
from sequoia.client import Client
from sequoia.rpc import open_sync_channel
from sequoia.v1 import worker_pb2, worker_pb2_grpc

_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "100"}
_WORKERS = ("verify", "draft")
MODULES = {**{role: f"{role}_worker.server" for role in _WORKERS}, "coordinator": "coordinator.server"}


class Cluster:
    """A context manager; `client` asks its coordinators. Names are `verify0`, `draft0`, `coordinator0`, ..."""

    def __init__(
        self,
        models: Mapping[str, Path],
        log_dir: Path,
        *,
        num_verify: int = 2,
        num_draft: int = 2,
        num_coordinators: int = 1,
        environment: Mapping[str, str] | None = None,
        clocks: Clocks | None = None,
        **flags: object,
    ) -> None:
        self.models = dict(models)  # by role: what is started from now on serves that
        self._log_dir, self._flags, self._clocks = log_dir, flags, clocks
        self._environment = {**_ENVIRONMENT, **(environment or {})}
        counts = {"verify": num_verify, "draft": num_draft, "coordinator": num_coordinators}
        self._roles = {f"{role}{index}": role for role, count in counts.items() for index in range(count)}
        self._addresses = {name: f"127.0.0.1:{free_port()}" for name in self._roles}
        self._processes: dict[str, ServerProcess] = {}
        self._stack = ExitStack()
        self.links: dict[str, FaultyLink] = {}

    def __enter__(self) -> Cluster:
        self._stack.callback(self._stop)
        try:
            for name, address in self._addresses.items():
                self.links[name] = self._stack.enter_context(FaultyLink(address))
            self.start(*self.names("verify"), *self.names("draft"))
            self.start(*self.names("coordinator"))
            self.client = self._stack.enter_context(Client(self._reached_at("coordinator"), timeout_seconds=120))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def all_names(self) -> list[str]:
        """Of all roles."""
        return list(self._roles)

    def names(self, role: str) -> list[str]:
        """The workers of a role."""
        return [name for name, its in self._roles.items() if its == role]

    def start(self, *names: str) -> None:
        """Start workers, again where they had been, and wait until they serve."""
        self.begin(*names)
        list(wait_until_serving([self._processes[name] for name in names]))

    def begin(self, *names: str) -> None:
        """Start workers and do not wait."""
        for name in names:
            role, flags = self._roles[name], {"listen": self._addresses[name]}
            if role == "coordinator":
                pools = {each: self._reached_at(each) for each in _WORKERS}
                flags |= {"failover-seconds": 30, **pools, **self._flags}
            else:
                flags |= {"model": self.models[role], "dtype": "float32", "num-threads": 1}
            environment = self._environment | (self._clocks.environment(name) if self._clocks else {})
            self._processes[name] = ServerProcess(name, MODULES[role], flags, environment, self._log_dir)

    def kill(self, name: str) -> None:
        """As a crash does."""
        self._processes[name].kill()

    def terminate(self, name: str) -> None:
        """As an operator does; does not wait."""
        self._processes[name].terminate()

    def wait(self, name: str) -> None:
        """Until it has ended by itself."""
        self._processes[name].wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        """SIGSTOP and SIGCONT above all."""
        os.kill(self._processes[name].pid, number)

    @property
    def process_ids(self) -> list[int]:
        """Of all, also of those that have ended and are not there again."""
        return [each.pid for each in self._processes.values()]

    def is_serving(self, name: str) -> bool:
        """Whether it answers, and says so."""
        with open_sync_channel(self._addresses[name]) as channel:
            try:
                health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        serving: bool = health.status == health_pb2.HealthCheckResponse.SERVING
        return serving

    def num_slots_used(self, name: str) -> int | None:
        """Of a worker; None where it does not answer."""
        with open_sync_channel(self._addresses[name]) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            try:
                return stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=5).num_slots_used
            except grpc.RpcError:
                return None

    def busy(self, role: str) -> str:
        """The worker that has a session now."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for name in self.names(role):
                if self.num_slots_used(name):
                    return name
        raise AssertionError(f"no {role} worker has a session")

    def wait_until_free(self, seconds: float = 10) -> None:
        """Until no worker holds a slot: raises AssertionError otherwise."""
        deadline = time.monotonic() + seconds
        workers = [*self.names("verify"), *self.names("draft")]
        while any((used := {name: self.num_slots_used(name) for name in workers}).values()):
            assert time.monotonic() < deadline, used

    def log(self, name: str) -> str:
        """What it has written."""
        return (self._log_dir / f"{name}.log").read_text()

    def _reached_at(self, role: str) -> str:
        return ",".join(self.links[each].address for each in self.names(role))

    def _stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.stdout.close()


def free_port() -> int:
    """One that stays free: the system gives none of these to those who ask for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
