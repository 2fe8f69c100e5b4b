"""Workers that die, hang, leave and answer nonsense: the client's text is the undisturbed one."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster import Cluster
from tiny_models import write_tiny_model, write_tiny_pair

from sequoia.border import error_from
from sequoia.errors import InvalidArgument, ResourceExhausted, Unavailable
from sequoia.options import build_request
from sequoia.rpc import open_sync_channel
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2_grpc

PROMPT = list(range(40, 70))
TREE = Topology((-1, 0, 0, 1, 1, 3))
GREEDY: dict[str, Any] = {"temperature": 0}
# With penalties that tell what was generated from the prompt.
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 11, "repetition_penalty": 1.1, "frequency_penalty": 0.3}
HOW = pytest.mark.parametrize("how", [GREEDY, SEEDED], ids=["greedy", "seeded"])
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tiny_pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(models, tmp_path_factory.mktemp("logs"), num_coordinators=2) as cluster:
        yield cluster


@pytest.fixture
def single(models: dict[str, Path], tmp_path: Path) -> Iterator[Cluster]:
    """One worker of each role, for a test that may break it."""
    with Cluster(models, tmp_path, num_verify=1, num_draft=1, **{"failover-seconds": 15}) as cluster:
        yield cluster


def ask(cluster: Cluster, **how: Any) -> tuple[int, ...]:
    return cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **how).token_ids


def ask_text(cluster: Cluster, **how: Any) -> str:
    return cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **how).text


def disturbed(cluster: Cluster, disturb: Any, **how: Any) -> tuple[tuple[int, ...], Any]:
    """All tokens of a stream in whose middle something happens, and its last chunk."""
    stream = cluster.client.stream(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, speculation=TREE, **how)
    token_ids: list[int] = []
    while len(token_ids) < 30:
        token_ids += next(stream).token_ids
    disturb()
    for chunk in stream:
        token_ids += chunk.token_ids
    return tuple(token_ids), chunk


@HOW
@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_verify_worker_that_ends_costs_no_text(cluster: Cluster, how: dict[str, Any], end: str) -> None:
    expected = ask(cluster, speculation="off", **how)
    gone: list[str] = []

    def disturb() -> None:
        gone.append(cluster.busy("verify"))
        getattr(cluster, end)(gone[0])

    found, last = disturbed(cluster, disturb, **how)
    cluster.wait(gone[0])
    assert found == expected
    if end == "kill":
        # One that is asked to end lets its sessions end, for some seconds.
        assert "is lost" in last.generation.speculation.fallback_reason
    cluster.wait_until_free()
    cluster.start(*gone)


@HOW
@pytest.mark.parametrize("speculation", ["off", TREE], ids=["off", "tree"])
def test_an_answer_held_to_a_schema_survives_its_verify_worker(
    cluster: Cluster, how: dict[str, Any], speculation: Any
) -> None:
    number = {"type": "integer", "minimum": 100, "maximum": 999}
    schema = {"type": "array", "items": number, "minItems": 40, "maxItems": 40}
    asked = {"max_tokens": 1000, "json_schema": schema, **how}
    expected = cluster.client.generate(PROMPT, speculation="off", **asked).text
    stream, text, gone = cluster.client.stream(PROMPT, speculation=speculation, **asked), "", ""
    for chunk in stream:
        text += chunk.text
        if not gone and len(text) > 60:
            gone = cluster.busy("verify")
            cluster.kill(gone)
    cluster.wait(gone)
    cluster.start(gone)
    assert text == expected
    assert len(json.loads(text)) == 40
    if speculation == "off":  # else the last reason may be the draft's
        assert "is lost" in chunk.generation.speculation.fallback_reason


@HOW
@pytest.mark.parametrize("fault", ["cut", "reset", "halve", "repeat"])
@pytest.mark.parametrize("role", ["verify", "draft"])
def test_a_link_that_breaks_costs_no_text(cluster: Cluster, how: dict[str, Any], fault: str, role: str) -> None:
    expected = ask(cluster, speculation="off", **how)
    found, _ = disturbed(cluster, lambda: getattr(cluster.links[cluster.busy(role)], fault)(), **how)
    assert found == expected
    cluster.wait_until_free()


@HOW
@pytest.mark.parametrize("end", ["kill", "terminate", "cut", "reset", "halve"])
def test_a_coordinator_that_is_lost_costs_no_text(cluster: Cluster, how: dict[str, Any], end: str) -> None:
    stop = cluster.client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, speculation="off", **how).text[-9:]
    expected = ask(cluster, speculation="off", stop=[stop], **how)

    def disturb() -> None:
        if end in ("kill", "terminate"):
            getattr(cluster, end)("coordinator0")
        else:
            getattr(cluster.links["coordinator0"], end)()

    found, last = disturbed(cluster, disturb, stop=[stop], **how)
    if end in ("kill", "terminate"):
        cluster.wait("coordinator0")
        cluster.start("coordinator0")
    assert found == expected
    whole = last.generation
    assert (whole.token_ids, whole.usage.num_completion_tokens) == (expected, len(expected))
    assert whole.text == ask_text(cluster, speculation="off", stop=[stop], **how)
    cluster.wait_until_free()


def test_an_unseeded_answer_goes_on_by_its_rule_and_seed(cluster: Cluster) -> None:
    found, last = disturbed(cluster, cluster.links["coordinator0"].reset, temperature=0.8)
    whole = last.generation
    assert whole.rule == "coupled"
    assert found == ask(cluster, temperature=0.8, seed=whole.seed)


@pytest.mark.parametrize(
    ("generated", "problem"),
    [
        ([10**6], "outside the vocabulary"),
        ([5] * NUM_TOKENS, "nothing is left"),
        ([40, 1], "the answer ends within them"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(cluster: Cluster, generated: list[int], problem: str) -> None:
    request = build_request(PROMPT, {"max_tokens": NUM_TOKENS})
    request.generated_token_ids[:] = generated
    with open_sync_channel(cluster.links["coordinator0"].address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate(request))
    found = error_from(caught.value)
    assert (type(found), found.field) == (InvalidArgument, "generated_token_ids")
    assert problem in found.message


def test_another_draft_takes_over(cluster: Cluster) -> None:
    expected = ask(cluster, speculation="off", **GREEDY)
    gone: list[str] = []

    def disturb() -> None:
        gone.append(cluster.busy("draft"))
        cluster.kill(gone[0])

    found, last = disturbed(cluster, disturb, **GREEDY)
    assert found == expected
    figures = last.generation.speculation
    assert 0 < figures.num_fallback_steps < figures.num_drafted_steps
    cluster.start(*gone)


def test_a_lone_verify_worker_is_waited_for(single: Cluster) -> None:
    expected = ask(single, speculation="off", **GREEDY)

    def disturb() -> None:
        single.kill("verify0")
        single.begin("verify0")

    found, _ = disturbed(single, disturb, **GREEDY)
    assert found == expected


def test_one_that_does_not_come_back_ends_the_request_by_name(single: Cluster) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"is lost|no verify worker is there"):
        disturbed(single, lambda: single.kill("verify0"), **GREEDY)
    assert time.monotonic() - started < 30


def test_a_verify_worker_that_hangs_is_left(cluster: Cluster) -> None:
    expected = ask(cluster, speculation="off", **GREEDY)
    hung: list[str] = []

    def disturb() -> None:
        hung.append(cluster.busy("verify"))
        cluster.signal(hung[0], signal.SIGSTOP)

    try:
        started = time.monotonic()
        found, last = disturbed(cluster, disturb, **GREEDY)
    finally:
        cluster.signal(hung[0], signal.SIGCONT)
    assert found == expected
    assert "hangs: nothing for" in last.generation.speculation.fallback_reason
    # Keepalive would have needed 20 to 30.
    assert time.monotonic() - started < 15
    cluster.wait_until_free()


def test_requests_wait_for_a_slot_and_too_many_are_told_when_to_try_again(
    models: dict[str, Path], tmp_path: Path
) -> None:
    one_slot, two_wait = {"SEQUOIA_NUM_SLOTS": "1"}, {"max-waiting": 2}
    with Cluster(models, tmp_path, num_verify=1, num_draft=1, environment=one_slot, **two_wait) as cluster:
        expected = ask(cluster, speculation="off", **GREEDY)
        with ThreadPoolExecutor(3) as pool:
            cluster.signal("verify0", signal.SIGSTOP)
            waiting = [pool.submit(ask, cluster, speculation="off", **GREEDY) for _ in range(3)]
            time.sleep(1.0)
            with pytest.raises(ResourceExhausted, match="queue: 1 requests run and 2 wait") as refused:
                ask(cluster, **GREEDY)
            cluster.signal("verify0", signal.SIGCONT)
            assert [each.result() for each in waiting] == 3 * [expected]
        assert refused.value.retry_seconds == 1.0
        cluster.wait_until_free()


def test_a_worker_with_another_model_is_not_let_in(single: Cluster, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "other", "llama", seed=5)
    single.kill("verify0")
    single.models["verify"] = tmp_path / "other"
    single.start("verify0")
    deadline = time.monotonic() + 20
    while "is not what the pool serves" not in single.log("coordinator0"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(Unavailable, match=r"no verify worker is there \(.* is not what the pool serves"):
        ask(single, **GREEDY)
