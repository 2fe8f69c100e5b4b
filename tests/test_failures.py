"""What goes wrong costs time and never text: a dead draft, a client that leaves, bad input, parts that do not fit."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import System, start_tiny_system
from rich.console import Console
from tiny_models import write_tiny_model

from coordinator.planner_job import plan_pair
from sequoia import AsyncClient
from sequoia.border import error_from
from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import Message
from sequoia.errors import InvalidArgument, Unavailable
from sequoia.planner import TreePlan
from sequoia.rpc import open_sync_channel
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2, coordinator_pb2_grpc, sampling_pb2

PROMPT = list(range(40, 70))
TREE = Topology((-1, 0, 0, 1, 1, 3))


def test_draft_killed_in_mid_request_costs_no_text(own_tiny_system: System) -> None:
    client = own_tiny_system.client
    undisturbed = client.generate(PROMPT, max_tokens=200, temperature=0, speculation="off")
    stream = client.stream(PROMPT, max_tokens=200, temperature=0, speculation=TREE)
    token_ids: list[int] = []
    while len(token_ids) < 40:
        token_ids.extend(next(stream).token_ids)
    own_tiny_system.deployment.kill("draft")
    for chunk in stream:
        token_ids.extend(chunk.token_ids)
        last = chunk
    assert tuple(token_ids) == undisturbed.token_ids
    assert last.generation is not None
    assert last.generation.speculation.num_drafted_steps > 0
    assert last.generation.speculation.num_fallback_steps > 0
    assert last.generation.speculation.fallback_reason.startswith("draft: lost (UNAVAILABLE")
    assert own_tiny_system.status("draft") == grpc.StatusCode.UNAVAILABLE
    assert own_tiny_system.num_slots_used("verify") == 0


@pytest.mark.slow
async def test_who_asks_as_others_did_that_have_just_gone_gets_the_same_text(own_tiny_system: System) -> None:
    """The rows of those who are gone are taken over, whatever their last forward was doing then."""
    prompts, asked = (PROMPT, list(range(90, 210))), {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    client = own_tiny_system.client
    undisturbed = [client.generate(prompt, speculation="off", **asked).token_ids for prompt in prompts]  # type: ignore[arg-type]

    async def leave_and_ask(client: AsyncClient, seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(50):
            at, left_after = choose.randrange(len(prompts)), choose.randrange(40)
            speculation = choose.choice(("off", TREE))
            stream = client.stream(prompts[at], speculation=speculation, **asked)  # type: ignore[arg-type]
            received = 0
            async for chunk in stream:
                if (received := received + len(chunk.token_ids)) > left_after:
                    break
            await stream.aclose()
            found = await client.generate(prompts[at], speculation=speculation, **asked)  # type: ignore[arg-type]
            assert found.token_ids == undisturbed[at]

    async with AsyncClient(own_tiny_system.deployment.address) as many:
        await asyncio.gather(*(leave_and_ask(many, seed) for seed in range(6)))


def test_a_crash_of_the_only_target_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQUOIA_FAILOVER_SECONDS", "3")
    for system in start_tiny_system(tmp_path, "llama"):
        address = system.deployment.addresses["verify"]
        stream = system.client.stream(PROMPT, max_tokens=400, temperature=0, speculation=TREE)
        next(stream)
        system.deployment.kill("verify")
        told = f"^(the verify worker at {address} is lost|no verify worker is there .*{address})"
        with pytest.raises(Unavailable, match=told):
            list(stream)
        with pytest.raises(Unavailable, match=told):
            system.client.generate(PROMPT, max_tokens=4, temperature=0)


def test_wedged_draft_is_never_awaited_before_the_first_token(own_tiny_system: System) -> None:
    client, draft = own_tiny_system.client, own_tiny_system.deployment.processes["draft"]
    undisturbed = client.generate(PROMPT, max_tokens=40, temperature=0, speculation="off")
    os.kill(draft.pid, signal.SIGSTOP)
    found = client.generate(PROMPT, max_tokens=40, temperature=0, speculation=TREE)
    os.kill(draft.pid, signal.SIGCONT)
    assert found.token_ids == undisturbed.token_ids
    assert found.speculation.num_drafted_steps == 0
    assert found.speculation.fallback_reason == "draft: not ready yet"


def test_plan_reaches_a_running_coordinator_without_a_restart(own_tiny_system: System) -> None:
    deployment, client = own_tiny_system.deployment, own_tiny_system.client
    assert list(client.describe_pair().plans_json) == []
    [plan] = asyncio.run(plan_pair(deployment.address, deployment.redis_url, prompts=["a tree"], max_tokens=24))
    deadline = time.monotonic() + 10
    while not client.describe_pair().plans_json:
        assert time.monotonic() < deadline
    assert TreePlan.from_json(client.describe_pair().plans_json[0]) == plan


def test_cancelled_request_frees_both_slots_within_a_second(tiny_system: System) -> None:
    stream = tiny_system.client.stream(PROMPT, max_tokens=400, temperature=0, speculation=TREE)
    for _ in range(3):
        next(stream)
    assert tiny_system.num_slots_used("verify") == 1
    assert tiny_system.num_slots_used("draft") == 1
    cancelled = time.monotonic()
    stream.close()
    while tiny_system.num_slots_used("verify") or tiny_system.num_slots_used("draft"):
        assert time.monotonic() - cancelled < 1.0


def test_requests_at_the_same_time_share_forwards_and_get_their_own_text(tiny_system: System) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [list(range(20 + i, 40 + 2 * i)) for i in range(4)]

    def generate(prompt: list[int]) -> tuple[int, ...]:
        return tiny_system.client.generate(prompt, max_tokens=48, temperature=0, speculation=TREE).token_ids

    alone = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, prompts))
    assert together == alone


def test_stop_string_inside_an_accepted_run_leaks_nothing(tiny_system: System) -> None:
    whole = tiny_system.client.generate(PROMPT, max_tokens=60, temperature=0, speculation="off").text
    stop = whole[len(whole) // 2 :][:3]
    found = tiny_system.client.generate(PROMPT, max_tokens=60, temperature=0, speculation=TREE, stop=[stop])
    assert found.text == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_max_tokens_cuts_inside_an_accepted_run(tiny_system: System, max_tokens: int) -> None:
    found = tiny_system.client.generate(PROMPT, max_tokens=max_tokens, temperature=0, speculation=TREE)
    assert len(found.token_ids) == max_tokens
    assert found.finish_reason == "length"


def test_generation_ends_at_the_context_limit(tiny_system: System) -> None:
    limit = tiny_system.client.describe_pair().verify.context_length
    prompt = [50 + i % 100 for i in range(limit - 10)]
    found = tiny_system.client.generate(prompt, max_tokens=100, temperature=0, speculation=TREE)
    assert len(found.token_ids) == 10
    assert found.finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"temperature": -0.1}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"seed": 7, "rule": "sequoia"}, "sampling.seed"),
        ({"rule": "greedy"}, "speculation.rule"),
        ({"rule": "coupled", "temperature": 0}, "speculation.rule"),
        ({"min_p": 1.1}, "sampling.min_p"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "sampling.repetition_penalty"),
        ({"presence_penalty": 2.5}, "sampling.presence_penalty"),
        ({"frequency_penalty": float("inf")}, "sampling.frequency_penalty"),
        ({"logit_bias": {5: 101}}, "sampling.logit_bias"),
        ({"logit_bias": {10**6: 1}}, "sampling.logit_bias"),
        ({"stop_token_ids": [10**6]}, "sampling.stop_token_ids"),
        ({"stop_token_ids": range(65)}, "sampling.stop_token_ids"),
        ({"min_tokens": 5}, "sampling.min_tokens"),
        ({"logprobs": 21}, "sampling.num_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [b"\xff\xfe"]}, "stop[0]"),
        ({"stop": [""]}, "stop[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "token_ids"),
        ({"prompt": [5] * 5000}, "token_ids"),
        ({"speculation": Topology.chain(65)}, "speculation.topology"),
    ],
)
def test_bad_input_is_refused_by_name(tiny_system: System, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tiny_system.client.generate(**{"prompt": PROMPT, "max_tokens": 4, **arguments})
    assert caught.value.field == field
    assert tiny_system.num_slots_used("verify") == 0


def test_bad_input_is_refused_by_the_server_itself_whatever_the_client(tiny_system: System) -> None:
    with open_sync_channel(tiny_system.deployment.address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        request = coordinator_pb2.GenerateRequest(
            token_ids=coordinator_pb2.TokenIds(ids=PROMPT),
            sampling=sampling_pb2.Sampling(temperature=-1),
            stop=[b"\xff"],
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Generate(request, timeout=10))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_from(caught.value).field == "sampling.temperature"


def test_model_without_a_chat_template_says_so_or_answers(tiny_system: System) -> None:
    assert tiny_system.client.generate([Message("user", "hi")], max_tokens=2).token_ids


def start(settings: DeploymentSettings) -> None:
    with Deployment(settings, Steps(Console(quiet=True))):
        pass


def test_unknown_model_stops_the_start_and_says_what_is_possible() -> None:
    with pytest.raises(InvalidArgument, match=r"model: .*no-such-model.*hub id"):
        start(DeploymentSettings(target="no-such-model", has_draft=False, listen="127.0.0.1:0"))


def test_mismatched_tokenizers_stop_the_start_and_name_both(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "target", "llama")
    write_tiny_model(tmp_path / "other", "llama", vocab_size=300)
    settings = DeploymentSettings(
        target=str(tmp_path / "target"), draft=str(tmp_path / "other"), listen="127.0.0.1:0", num_threads=1
    )
    with pytest.raises(Unavailable, match=r"error: draft: .*different tokenizers"):
        start(settings)
