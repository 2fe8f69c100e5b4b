"""Drafting ahead through three real processes: the same text, hits that are told, slots that are freed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import reference
import torch
from conftest import System, start_tiny_system
from test_exactness import chi_square_z
from test_failures import PROMPT, TREE
from test_seeds import SETTINGS, WAYS
from transformers import AutoModelForCausalLM

from sequoia.client import Generation
from sequoia.rpc import open_channel, open_sync_channel
from sequoia.sampling import Sampling
from sequoia.topology import DynamicShape, Topology, TreeShape
from sequoia.v1 import draft_pb2, draft_pb2_grpc, tree_pb2, worker_pb2, worker_pb2_grpc
from sequoia.v1.sampling_pb2 import RULE_GREEDY
from sequoia.wire import sampling_to_wire

SHAPES = (TREE, Topology.chain(4), Topology((-1, *[0] * 5)), DynamicShape(16, 5, 4))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def ahead_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Forced on, although both workers share the processor."""
    yield from started(tmp_path_factory, request.param, "on", noise=0.02)


@pytest.fixture(scope="module")
def same_model_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Forced on; the draft is the target itself."""
    yield from started(tmp_path_factory, "llama", "on", noise=0.0)


def started(
    factory: pytest.TempPathFactory, architecture: str, mode: str, *, noise: float, **environment: str
) -> Iterator[System]:
    systems = start_tiny_system(factory.mktemp(architecture), architecture, noise=noise)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SEQUOIA_DRAFT_AHEAD": mode, **environment}.items():
            patch.setenv(name, value)
        system = next(systems)
    yield system
    yield from systems


def generated(system: System, **options: Any) -> Generation:
    return system.client.generate(PROMPT, **{"max_tokens": 64, "ignore_eos": True, **options})


def num_forwards(system: System) -> int:
    with open_sync_channel(system.deployment.processes["draft"].address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=5).num_forwards


@pytest.mark.parametrize("shape", SHAPES, ids=["tree", "chain", "star", "dynamic"])
def test_greedy_text_is_that_of_plain_decoding(ahead_system: System, shape: TreeShape) -> None:
    plain = generated(ahead_system, temperature=0, speculation="off", max_tokens=160)
    found = generated(ahead_system, temperature=0, speculation=shape, max_tokens=160)
    assert found.token_ids == plain.token_ids
    assert found.speculation.num_ahead_attempts > 0


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_seed_gives_the_text_of_plain_decoding(ahead_system: System, setting: dict[str, Any]) -> None:
    num_hits = 0
    for seed in (0, 7, 2**64 - 1):
        plain = generated(ahead_system, seed=seed, speculation="off", **setting)
        for way in WAYS:
            found = generated(ahead_system, seed=seed, speculation=way, **setting)
            assert found.token_ids == plain.token_ids
            num_hits += found.speculation.num_ahead_hits
    assert num_hits > 0


def test_requests_at_the_same_time_keep_their_own_text(ahead_system: System) -> None:
    """Their trees ahead share forwards."""
    seeds = (1, 2, 3, 4)
    plain = [generated(ahead_system, seed=seed, speculation="off").token_ids for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: generated(ahead_system, seed=seed, speculation=TREE), seeds))
    assert [each.token_ids for each in found] == plain


@pytest.mark.parametrize("rule", ["sequoia", "traversal"])
def test_tokens_of_trees_that_were_drawn_ahead_have_the_targets_law(same_model_system: System, rule: str) -> None:
    """Chi-square of 400 runs of five tokens: the last of them come from the second step's trees and the third's.

    z above 3.72: false alarm 1e-4 a rule. Draws are fresh, so that alarm can go off.
    """
    system, draws = same_model_system, 400
    module = AutoModelForCausalLM.from_pretrained(system.target, dtype=torch.float32)
    sampling = Sampling(temperature=1.2, top_k=2)

    def law(tokens: tuple[int, ...], count: int) -> dict[tuple[int, ...], float]:
        if not count:
            return {(): 1.0}
        with torch.inference_mode():
            row = module(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].tolist()
        p = {token: each for token, each in enumerate(reference.probabilities(row, sampling)) if each > 0.0}
        rest = {token: law((*tokens, token), count - 1) for token in p}
        return {(token, *run): p[token] * each for token in p for run, each in rest[token].items()}

    def run() -> Generation:
        shape = Topology((-1, 0, 0))
        return generated(system, temperature=1.2, top_k=2, rule=rule, max_tokens=9, speculation=shape)

    answers = [run() for _ in range(draws)]
    found, expected = Counter(each.token_ids[:5] for each in answers), law((), 5)
    assert set(found) <= set(expected)
    assert sum(each.speculation.num_ahead_hits for each in answers) > draws / 8
    assert chi_square_z(found, expected, draws) < 3.72


def test_a_draft_that_is_the_target_is_often_right(same_model_system: System) -> None:
    """Whenever its guess was begun in time, which nobody can promise on a processor that is shared."""
    found = generated(same_model_system, temperature=0, speculation=TREE, max_tokens=400)
    assert found.speculation.num_ahead_hits > found.speculation.num_drafted_steps / 8
    assert found.to_dict()["speculation"]["draft_ahead"]["hits"] == found.speculation.num_ahead_hits


def test_on_one_device_auto_is_off_and_costs_no_forward(tiny_system: System) -> None:
    """One forward for the prompt, one for each level of a tree but the last."""
    before = num_forwards(tiny_system)
    figures = generated(tiny_system, temperature=0, speculation=TREE).speculation
    grown = sum(each.num_steps * (each.shape.levels - 1) for each in figures.trees if each.shape.size > 1)
    assert num_forwards(tiny_system) - before == 1 + grown
    assert figures.num_ahead_attempts == 0


@pytest.mark.parametrize(
    ("has_own_device", "ahead"),
    [(True, draft_pb2.DRAFT_AHEAD_MISS), (False, draft_pb2.DRAFT_AHEAD_NOT_ATTEMPTED)],
)
async def test_auto_drafts_ahead_on_a_device_of_its_own_only(
    tiny_system: System, has_own_device: bool, ahead: draft_pb2.DraftAhead
) -> None:
    """The step comes when a forward was done, if one is to be done at all, with tokens that nobody guessed."""
    opening = draft_pb2.DraftOpen(
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        sampling=sampling_to_wire(Sampling(temperature=0.0)),
        rule=RULE_GREEDY,
        has_own_device=has_own_device,
    )
    topology = tree_pb2.Topology(parents=TREE.parents)
    first = draft_pb2.DraftStep(step=1, base_len=len(PROMPT) - 1, token_ids=PROMPT[-1:], topology=topology)
    second = draft_pb2.DraftStep(step=2, base_len=len(PROMPT), token_ids=[300, 301, 302, 303, 304], topology=topology)
    async with open_channel(tiny_system.deployment.processes["draft"].address) as channel:
        call = draft_pb2_grpc.DraftServiceStub(channel).Draft(timeout=30)
        await call.write(draft_pb2.DraftRequest(open=opening))
        await call.read()
        before = num_forwards(tiny_system)
        answers = []
        for step in (first, second):
            await call.write(draft_pb2.DraftRequest(step=step))
            answers.append((await call.read()).ahead)
            while has_own_device and num_forwards(tiny_system) - before < TREE.levels:
                pass
        call.cancel()
    assert answers == [draft_pb2.DRAFT_AHEAD_NOT_ATTEMPTED, ahead]


def test_cancelled_request_frees_the_slot_that_trees_ahead_grow_in(ahead_system: System) -> None:
    stream = ahead_system.client.stream(PROMPT, max_tokens=400, temperature=0, speculation=TREE)
    for _ in range(3):
        next(stream)
    assert ahead_system.num_slots_used("draft") == 1
    cancelled = time.monotonic()
    stream.close()
    while ahead_system.num_slots_used("draft") or ahead_system.num_slots_used("verify"):
        assert time.monotonic() - cancelled < 10.0
    undisturbed = generated(ahead_system, temperature=0, speculation="off")
    assert generated(ahead_system, temperature=0, speculation=TREE).token_ids == undisturbed.token_ids


@pytest.fixture
def deterministic_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from started(tmp_path_factory, "llama", "on", noise=0.02, SEQUOIA_DETERMINISTIC="1")


def test_a_deterministic_deployment_drafts_ahead_too(deterministic_system: System) -> None:
    plain = generated(deterministic_system, seed=3, speculation="off")
    found = generated(deterministic_system, seed=3, speculation=TREE)
    assert found.token_ids == plain.token_ids
    assert found.speculation.num_ahead_hits > 0
