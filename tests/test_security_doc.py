"""What docs/security.md tells to type works as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from coordinator.clients_file import read_clients
from coordinator.gateway.config import GatewayConfig
from coordinator.server import CoordinatorConfig
from sequoia.cli import _parser
from sequoia.rpc import Server, open_channel
from sequoia.tls import Tls
from sequoia.v1 import worker_pb2, worker_pb2_grpc
from sequoia.worker_config import WorkerConfig

PAGE = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def block(kind: str, index: int = 0) -> str:
    return [text for name, text in BLOCKS if name == kind][index]


def make_certificates(folder: Path) -> None:
    subprocess.run(["sh", "-eu", "-c", block("sh")], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates, and is not installed")
async def test_its_certificates_are_believed_on_both_sides(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    server, client = (
        Tls(f"{tmp_path}/{name}.pem", f"{tmp_path}/{name}.key", f"{tmp_path}/ca.pem")
        for name in ("verify", "coordinator")
    )
    serving = Server("127.0.0.1:0", server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker_pb2_grpc.WorkerServiceServicer(), serving.grpc_server)
    address = await serving.start(["sequoia.v1.WorkerService"])
    async with open_channel(address, client) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
    await serving.stop(0)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "it was reached, and has nothing to tell"


def test_its_clients_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text(block("toml"))
    ann, batch = read_clients(tmp_path / "clients.toml")
    assert (ann.name, ann.limits.max_sessions, batch.identities) == ("ann", 8, ("batch.example",))


def test_its_flags_are_those_of_the_processes_and_commands() -> None:
    known = {"--out", "--address"}
    for settings in (WorkerConfig, CoordinatorConfig, GatewayConfig):
        known |= {f"--{name.replace('_', '-')}" for name in settings.__dataclass_fields__}
    for command in ("generate", "plan"):
        known |= set(re.findall(r"--[a-z-]+", _help(command)))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known


def _help(command: str) -> str:
    commands = _parser([command])._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    return str(commands[command].format_help())  # type: ignore[index]
