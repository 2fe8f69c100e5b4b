"""KV memory goes by what a session may need, and what was read once is not read again; across real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster import Cluster
from conftest import System
from tiny_models import write_tiny_model, write_tiny_pair

from sequoia.border import error_from
from sequoia.cli.process import ServerProcess, wait_until_serving
from sequoia.errors import InvalidArgument, Unavailable
from sequoia.rpc import open_sync_channel
from sequoia.rules import GREEDY
from sequoia.sampling import Sampling
from sequoia.topology import Topology
from sequoia.v1 import tree_pb2, verify_pb2, verify_pb2_grpc
from sequoia.wire import rule_to_wire, sampling_to_wire

PROMPT = list(range(40, 100))
TREE = Topology((-1, 0, 0, 1, 1, 3))
# One session with a whole context and a tree, and no more.
MEMORY = {"SEQUOIA_CONTEXT_LENGTH": "512", "SEQUOIA_MAX_TREE_SIZE": "16", "SEQUOIA_KV_TOKENS": "528"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("admission")
    environment = {**MEMORY, "SEQUOIA_DRAFT_AHEAD": "off"}
    with Cluster(write_tiny_pair(folder), folder, num_verify=1, num_draft=1, environment=environment) as running:
        yield running


@pytest.mark.parametrize("speculation", [TREE, "off"], ids=["trees", "plain"])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "seeded"])
def test_what_was_read_for_one_request_is_not_read_for_the_next(
    tiny_system: System, speculation: Topology, how: dict[str, Any]
) -> None:
    client, prompt = tiny_system.client, [len(str(speculation)) + len(how), *PROMPT]
    first = client.generate(prompt, max_tokens=24, speculation=speculation, **how)
    assert first.usage.num_cached_prompt_tokens == 0
    again = client.generate(prompt, max_tokens=24, speculation=speculation, **how)
    assert again.usage.num_cached_prompt_tokens == len(prompt) - 1
    assert again.token_ids == first.token_ids
    next_turn = [*prompt, *first.token_ids, 5, 6, 7]
    answered = client.generate(next_turn, max_tokens=8, speculation=speculation, **how)
    assert answered.usage.num_cached_prompt_tokens >= len(prompt) + len(first.token_ids) - 1


def test_memory_for_one_long_session_is_memory_for_many_short_ones(cluster: Cluster) -> None:
    client = cluster.client
    with ThreadPoolExecutor(8) as pool:
        streams = [client.stream([n, *PROMPT[:20]], max_tokens=40, temperature=0, speculation="off") for n in range(6)]
        list(pool.map(next, streams))
        assert cluster.num_slots_used("verify0") == 6
        for stream in streams:
            stream.close()


def test_who_does_not_fit_waits_and_gets_the_same_text(cluster: Cluster) -> None:
    def ask(number: int) -> tuple[int, ...]:
        prompt, max_tokens = [number, *PROMPT[: 10 * number]], 400 if number % 3 == 0 else 40
        return cluster.client.generate(prompt, max_tokens=max_tokens, temperature=0, speculation=TREE).token_ids

    alone = list(map(ask, range(6)))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
    cluster.wait_until_free()


def verified(address: str, *messages: verify_pb2.VerifyRequest) -> list[verify_pb2.VerifyResponse]:
    with open_sync_channel(address) as channel:
        try:
            return list(verify_pb2_grpc.VerifyServiceStub(channel).Verify(iter(messages), timeout=20))
        except grpc.RpcError as error:
            raise error_from(error) from error


def opening(num_tokens: int, max_num_tokens: int) -> verify_pb2.VerifyRequest:
    sampling, rule = sampling_to_wire(Sampling(temperature=0.0)), rule_to_wire(GREEDY)
    token_ids = PROMPT[:num_tokens]
    message = verify_pb2.VerifyOpen(
        token_ids=token_ids, num_prompt_tokens=num_tokens, sampling=sampling, rule=rule, max_num_tokens=max_num_tokens
    )
    return verify_pb2.VerifyRequest(open=message)


def test_a_session_ends_where_it_said_that_it_would(tiny_system: System) -> None:
    steps = verify_pb2.VerifyRequest(step=verify_pb2.VerifyStep(step=1, prefix_len=10, num_plain_steps=50))
    responses = verified(tiny_system.deployment.addresses["verify"], opening(10, 14), steps)
    assert [each.num_plain_steps_left for each in responses] == [0, 50, 49, 0]


def test_a_session_cannot_outgrow_its_memory(tiny_system: System) -> None:
    address = tiny_system.deployment.addresses["verify"]
    with pytest.raises(InvalidArgument, match="10 tokens leave no room in a session of 10"):
        verified(address, opening(10, 10))
    [first] = verified(address, opening(10, 12))
    chain = tree_pb2.TokenTree(
        topology=tree_pb2.Topology(parents=[-1, 0, 1]), token_ids=[first.verdict.bonus_token_id, 1, 2]
    )
    step = verify_pb2.VerifyRequest(step=verify_pb2.VerifyStep(step=1, prefix_len=10, tree=chain))
    with pytest.raises(InvalidArgument, match="reaches past the 12 tokens of this session"):
        verified(address, opening(10, 12), step)


def test_memory_for_less_than_one_session_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama")
    flags = {"model": tmp_path / "model", "context-length": 512, "kv-tokens": 500}
    process = ServerProcess("verify", "verify_worker.server", flags, {}, tmp_path)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="kv-tokens: 500 is less than the 576 that one session"):
        list(wait_until_serving([process]))
    assert time.monotonic() - started < 60
