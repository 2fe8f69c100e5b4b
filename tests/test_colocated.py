"""Coordinator and workers in one process: the same text as of three, and one loss that is told clearly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import System, start_tiny_system
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_models import write_tiny_pair

from sequoia import attempts
from sequoia.cli import colocated
from sequoia.errors import Unavailable
from sequoia.rpc import open_sync_channel
from sequoia.topology import Topology
from sequoia.v1 import worker_pb2, worker_pb2_grpc

linux = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
PROMPT = list(range(40, 70))
TREE = Topology((-1, 0, 0, 1, 1, 3))
SERVICES = {"verify": "sequoia.v1.VerifyService", "draft": "sequoia.v1.DraftService"}


@pytest.fixture(scope="module")
def colocated_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from start_tiny_system(tmp_path_factory.mktemp("together"), "llama", placement="colocated")


@pytest.mark.parametrize("parameters", [{"temperature": 0}, {"temperature": 0.8, "seed": 7}])
@pytest.mark.parametrize("speculation", ["auto", TREE])
def test_colocated_workers_write_the_text_of_split_ones(
    tiny_system: System, colocated_system: System, parameters: dict[str, Any], speculation: Any
) -> None:
    arguments = {"max_tokens": 96, "ignore_eos": True, "speculation": speculation, **parameters}
    split, together = (each.client.generate(PROMPT, **arguments) for each in (tiny_system, colocated_system))
    assert together.token_ids == split.token_ids
    assert together.speculation.num_drafted_steps > 0


def test_requests_at_the_same_time_get_their_own_text(colocated_system: System) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [list(range(20 + i, 40 + 2 * i)) for i in range(4)]

    def generate(prompt: list[int]) -> tuple[int, ...]:
        return colocated_system.client.generate(prompt, max_tokens=48, temperature=0, speculation=TREE).token_ids

    alone = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generate, prompts)) == alone


def test_all_is_one_process_and_the_workers_are_on_one_device(colocated_system: System) -> None:
    assert list(colocated_system.deployment.processes) == ["system"]
    pair = colocated_system.client.describe_pair()
    assert pair.verify.device_id == pair.draft.device_id
    assert len({pair.verify.instance_id, pair.draft.instance_id}) == 2


@pytest.mark.parametrize("name", ["verify", "draft"])
def test_each_service_has_its_own_address_health_and_curve(colocated_system: System, name: str) -> None:
    address = colocated_system.deployment.addresses[name]
    assert address.startswith("unix:")
    with open_sync_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICES[name])
        health = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        worker = worker_pb2_grpc.WorkerServiceStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=5).worker
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert worker.role == worker_pb2.WorkerRole.Value(f"WORKER_ROLE_{name.upper()}")
    assert worker.latencies[0].num_tokens[-1] == worker.max_tree_size


@pytest.mark.parametrize("name", ["verify", "draft"])
def test_the_other_service_is_not_there(colocated_system: System, name: str) -> None:
    (other,) = SERVICES.keys() - {name}
    with open_sync_channel(colocated_system.deployment.addresses[name]) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICES[other])
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@linux
def test_the_coordinator_has_no_connection_to_its_workers(tmp_path: Path) -> None:
    for system in start_tiny_system(tmp_path, "llama", placement="colocated"):
        addresses = system.deployment.addresses.values()
        answer = system.client.generate(PROMPT, max_tokens=16, temperature=0, speculation=TREE)
        assert answer.speculation.num_drafted_steps > 0
        assert [num_sockets(address) for address in addresses] == [1, 1], "those that listen"
        with open_sync_channel(system.deployment.addresses["verify"]) as channel:
            worker_pb2_grpc.WorkerServiceStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=5)
            assert [num_sockets(address) for address in addresses] == [2, 1]


def num_sockets(address: str) -> int:
    """Ends of sockets there: the one that listens, and one for each connection."""
    path = address.removeprefix("unix:")
    return [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()].count(path)


def test_sigterm_lets_a_running_request_end(tmp_path: Path) -> None:
    arguments = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "speculation": TREE}
    for system in start_tiny_system(tmp_path, "llama", placement="colocated"):
        undisturbed = system.client.generate(PROMPT, **arguments)
        stream = system.client.stream(PROMPT, **arguments)
        chunks = [next(stream)]
        process = system.deployment.processes["system"]
        process.terminate()
        chunks += stream
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == undisturbed.token_ids
        assert chunks[-1].generation.speculation.num_drafted_steps > 0
        assert "was ended by" not in process.obituary()


def test_a_crash_of_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_RETRY_SECONDS", 2.0)
    for system in start_tiny_system(tmp_path, "llama", placement="colocated"):
        told = f"^no coordinator answers at {system.deployment.address}"
        stream = system.client.stream(PROMPT, max_tokens=400, temperature=0, speculation=TREE)
        next(stream)
        system.deployment.kill("system")
        killed = time.monotonic()
        with pytest.raises(Unavailable, match=told):
            list(stream)
        assert time.monotonic() - killed < 10
        with pytest.raises(Unavailable, match=told):
            system.client.generate(PROMPT, max_tokens=4, temperature=0)


@contextmanager
def up(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`sequoia up --json` on tiny models, and the object that it prints."""
    write_tiny_pair(folder)
    models = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--num-threads", "1"]
    run = "import sys; from sequoia.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "up", "--json", "--listen", "127.0.0.1:0", *models, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.terminate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@linux
def test_up_has_one_process_for_all_and_leaves_no_socket_behind(tmp_path: Path) -> None:
    with up(tmp_path, "--placement", "auto") as (process, system):
        assert system["placement"] == "colocated"
        assert list(system["processes"]) == ["system"]
        redis = 1
        assert len(children(process.pid)) == redis + len(system["processes"]) == 2
        sockets = [Path(address.removeprefix("unix:")) for address in system["workers"].values()]
        assert all(socket.is_socket() for socket in sockets)
        assert {socket.parent.stat().st_mode & 0o777 for socket in sockets} == {0o700}
        process.terminate()
        assert process.wait(20) == 130
    assert not any(socket.parent.exists() for socket in sockets)


def test_up_ends_and_says_why_when_the_system_crashes(tmp_path: Path) -> None:
    with up(tmp_path, "--placement", "colocated") as (process, system):
        os.kill(system["processes"]["system"], signal.SIGKILL)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "error: the system process was ended by SIGKILL" in error


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="needs two cores")
def test_workers_on_cores_of_their_own_do_not_share_a_device(tmp_path: Path) -> None:
    with up(tmp_path, "--draft-cores", "1", "--target-cores", "1") as (_, system):
        assert system["placement"] == "split"
        cores = [os.sched_getaffinity(system["processes"][name]) for name in ("verify", "draft")]
        device_ids = {describe(address).device_id for address in system["workers"].values()}
    assert [len(each) for each in cores] == [1, 1]
    assert cores[0] != cores[1]
    assert len(device_ids) == 2


def describe(address: str) -> worker_pb2.WorkerDescription:
    with open_sync_channel(address) as channel:
        return worker_pb2_grpc.WorkerServiceStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=5).worker


REQUIRED = ("--target-model", "t", "--draft-model", "d", "--coordinator-verify", "unix:/t")


def test_what_is_required_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["colocated", *REQUIRED[:-2]])
    with pytest.raises(SystemExit):
        colocated.main()
    assert capsys.readouterr().err.startswith("error: --coordinator-verify (SEQUOIA_VERIFY) is required")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--target-quantization", "int3"), "error: --target-quantization (SEQUOIA_QUANTIZATION) is 'int3'"),
        (("--draft-num-threads", "2"), "error: --target-num-threads and --draft-num-threads must be the same"),
        (("--draft-prefill-chunk", "0"), "error: --draft-prefill-chunk (SEQUOIA_PREFILL_CHUNK) must be at least 1"),
        (("--draft-dtype", "float8"), "error: --draft-dtype (SEQUOIA_DTYPE) is 'float8'"),
        (("--coordinator-rule", "luck"), "error: --coordinator-rule (SEQUOIA_RULE) is 'luck'"),
        (("--coordinator-verify", "dns:///x"), "error: --coordinator-verify (SEQUOIA_VERIFY): "),
        (
            ("--coordinator-log-level", "debug"),
            "error: --target-log-level, --draft-log-level and --coordinator-log-level must be the same",
        ),
    ],
)
def test_a_bad_flag_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], error: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["colocated", *REQUIRED, *flags])
    monkeypatch.setattr(colocated, "configure_logging", lambda *_: None)
    with pytest.raises(SystemExit) as raised:
        colocated.main()
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(error)
