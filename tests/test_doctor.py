"""`sequoia doctor`: on running systems, on pairs that a scripted coordinator describes, on models and on Redis."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from conftest import System
from redis import Redis
from tiny_models import write_tiny_model

from sequoia.border import Context
from sequoia.cli import main
from sequoia.cli.checkup.finding import Finding
from sequoia.cli.redis import EmbeddedRedis
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc
from sequoia.v1.worker_pb2 import LatencyCurve, WorkerDescription

NOBODY = "127.0.0.1:1"


def worker(seconds: float, tokenizer_hash: str = "a", device: str = "one") -> WorkerDescription:
    curve = LatencyCurve(num_tokens=[1, 64], seconds=[seconds, 2 * seconds], num_sessions=1)
    return WorkerDescription(model="m", latencies=[curve], tokenizer_hash=tokenizer_hash, device_id=device)


class ScriptedCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Describes a pair in which nothing is wrong, until a test says otherwise."""

    def __init__(self) -> None:
        self.pair = pb.DescribePairResponse(
            verify=worker(0.1), draft=worker(0.01), verify_rtt_seconds=0.001, draft_rtt_seconds=0.001
        )

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return self.pair

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        return pb.ExplainResponse(state=pb.SPECULATION_STATE_REDUCED, state_reason="it is slower than promised")


@pytest.fixture
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator()


async def told(capsys: pytest.CaptureFixture[str], *flags: str, status: int = 0) -> list[Finding]:
    """The command, kept off the loop that serves it."""
    assert await asyncio.to_thread(main, ["doctor", "--json", *flags]) == status
    return [Finding(**each) for each in json.loads(capsys.readouterr().out)]


def grades(findings: list[Finding], subject: str) -> list[str]:
    return [each.grade for each in findings if each.subject == subject]


def test_a_running_system_is_well(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    deployment = tiny_system.deployment
    assert main(["doctor", "--json", "--address", deployment.address, "--redis", deployment.redis_url]) == 0
    found = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert {"versions", "device", "memory", "target", "draft", "link", "pair", "plan", "redis"} <= {
        each.subject for each in found
    }
    assert [each for each in found if each.grade == "bad"] == []
    assert grades(found, "redis") == ["good"]


def test_the_table_tells_remedies(tiny_system: System, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", tiny_system.deployment.address]) == 0
    assert "→ measure the pair: `sequoia plan`" in capsys.readouterr().out


async def test_a_far_worker_and_a_slow_draft_are_noted(
    coordinator: ScriptedCoordinator, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await told(capsys, "--address", address)
    assert (grades(found, "link"), grades(found, "draft")) == (["good", "good"], ["good", "good"])
    coordinator.pair.draft_rtt_seconds = 0.02
    coordinator.pair.draft.latencies[0].seconds[:] = [0.08, 0.09]
    found = await told(capsys, "--address", address)
    assert (grades(found, "link"), grades(found, "draft")) == (["good", "note"], ["good", "note"])
    assert grades(found, "state") == ["note"]


async def test_a_pair_that_cannot_speculate_is_bad(
    coordinator: ScriptedCoordinator, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.pair.draft.tokenizer_hash = "b"
    found = await told(capsys, "--address", address, status=1)
    assert grades(found, "pair") == ["bad"]
    coordinator.pair.ClearField("draft")
    found = await told(capsys, "--address", address, status=1)
    assert grades(found, "draft") == ["bad"]


async def test_nobody_at_a_named_address_is_bad_and_at_the_usual_one_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await told(capsys, "--address", NOBODY, status=1)
    assert grades(found, "coordinator") == ["bad"]
    monkeypatch.delenv("SEQUOIA_ADDRESS", raising=False)
    monkeypatch.setattr("sequoia.client.DEFAULT_ADDRESS", NOBODY)
    found = await told(capsys)
    assert grades(found, "system") == ["note"]


async def test_models_of_different_tokenizers_are_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    write_tiny_model(first, "llama")
    write_tiny_model(second, "llama")
    write_tiny_model(other, "llama")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    one, two = list(tokens)[-2:]
    tokens[one], tokens[two] = tokens[two], tokens[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = ("--address", NOBODY, "--target", str(first))
    assert grades(await told(capsys, *asked, "--draft", str(second), status=1), "pair") == ["good"]
    assert grades(await told(capsys, *asked, "--draft", str(other), status=1), "pair") == ["bad"]
    [finding] = [each for each in await told(capsys, "--target", str(tmp_path), status=1) if each.grade == "bad"]
    assert finding.subject == "target"


async def test_a_redis_that_evicts_is_noted_and_one_that_is_not_there_is_bad(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with EmbeddedRedis() as server:
        Redis.from_url(server.url).config_set("maxmemory-policy", "allkeys-lru")
        found = await told(capsys, "--redis", server.url)
        assert grades(found, "redis") == ["note"]
    found = await told(capsys, "--redis", "redis://127.0.0.1:1/0", status=1)
    assert grades(found, "redis") == ["bad"]


async def test_a_password_is_not_sent_to_another_host_in_plain_text_nor_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = await told(capsys, "--redis", "redis://:geheim@192.0.2.1:6379/0", status=1)
    [redis] = [each for each in found if each.subject == "redis"]
    assert "would be plain text" in redis.what
    assert "geheim" not in redis.what


def test_a_draft_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--draft", "smollm2-135m"]) == 2
    assert "draft: says what a target is drafted by; give --target too" in capsys.readouterr().err
