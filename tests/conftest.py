"""Fixtures that several test files share: running systems of real processes, and servers of scripted coordinators."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from rich.console import Console
from tiny_models import ARCHITECTURES, write_tiny_pair

from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import Client
from sequoia.rpc import Server, open_sync_channel
from sequoia.v1 import worker_pb2, worker_pb2_grpc
from sequoia.v1.coordinator_pb2_grpc import CoordinatorServiceServicer, add_CoordinatorServiceServicer_to_server


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models have nothing to divide: where others are at work a second thread makes them six times slower."""
    torch.set_num_threads(1)


@asynccontextmanager
async def serving(coordinator: CoordinatorServiceServicer) -> AsyncIterator[str]:
    """The address where a scripted coordinator serves, in the test's own loop."""
    server = Server("127.0.0.1:0")
    add_CoordinatorServiceServicer_to_server(coordinator, server.grpc_server)
    yield await server.start(["sequoia.v1.CoordinatorService"])
    await server.stop(0)


@pytest.fixture
async def address(coordinator: CoordinatorServiceServicer) -> AsyncIterator[str]:
    """Where the `coordinator` of the test's own module serves."""
    async with serving(coordinator) as address:
        yield address


@dataclass(frozen=True)
class System:
    """A running system, its target's folder, and a client."""

    deployment: Deployment
    target: Path
    client: Client

    def num_slots_used(self, name: str) -> int:
        """KV slots in use on one of the workers."""
        with open_sync_channel(self.deployment.addresses[name]) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            return stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=5).num_slots_used

    def status(self, name: str) -> grpc.StatusCode:
        """How one of the workers answers."""
        try:
            self.num_slots_used(name)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def start_tiny_system(
    folder: Path,
    architecture: str,
    *,
    noise: float = 0.02,
    dtype: str = "float32",
    engine: str = "auto",
    placement: str = "split",
    http_port: int | None = None,
    chat_template: str | None = None,
) -> Iterator[System]:
    """A tiny random target, and a draft that is the same model with some noise on its weights."""
    models = write_tiny_pair(folder, architecture, noise=noise, chat_template=chat_template)
    settings = DeploymentSettings(
        target=str(models["verify"]),
        draft=str(models["draft"]),
        dtype=dtype,
        engine=engine,
        listen="127.0.0.1:0",
        num_threads=1,
        placement=placement,
        http_port=http_port,
    )
    with (
        Deployment(settings, Steps(Console(quiet=True))) as deployment,
        Client(deployment.address, timeout_seconds=60) as client,
    ):
        yield System(deployment, models["verify"], client)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def every_tiny_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system an architecture."""
    yield from start_tiny_system(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiny_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system of tiny Llama models."""
    yield from start_tiny_system(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def own_tiny_system(tmp_path: Path) -> Iterator[System]:
    """A system of tiny Llama models for one test, which may break it."""
    yield from start_tiny_system(tmp_path, "llama")
