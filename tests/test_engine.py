"""The engine against `transformers` itself: packed ragged batches, tree masks, kept rows, chunked prefill."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import load_engine
from tiny_models import READABLE_ARCHITECTURES, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from sequoia.engine.attention import Segment, chunk_segment, tree_segment
from sequoia.engine.executor import EngineThread, Executor, Job
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVSlot
from sequoia.errors import ResourceExhausted
from sequoia.topology import TokenTree, Topology
from sequoia.worker import feed

TOLERANCE = 1e-3
# Wider and deeper than the sliding window of the tiny Gemma 3 (with the prompt before it).
SHAPE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 7, 8))


class Oracle:
    """A `transformers` model with its own attention and no cache."""

    def __init__(self, folder: Path) -> None:
        self.module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def logits(self, token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return self.module(torch.tensor([token_ids])).logits[0, -1]


@pytest.fixture(
    scope="module", params=product(READABLE_ARCHITECTURES, ("graphs", "lean", "transformers")), ids="-".join
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Oracle]:
    folder = tmp_path_factory.mktemp("model")
    architecture, engine = request.param
    write_tiny_model(folder, architecture)
    return load_engine(folder, engine=engine), Oracle(folder)


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 250, count).tolist()


def path_tokens(tree: TokenTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(tree.token_ids[node])
        node = tree.topology.parents[node]
    return path[::-1]


def prefill(engine: Engine, slot: KVSlot, tokens: list[int]) -> None:
    engine.forward([chunk_segment(slot, tokens, logits=False)])
    slot.keep(range(len(tokens)))


def test_tree_logits_equal_the_logits_of_every_path(pair: tuple[Engine, Oracle]) -> None:
    engine, oracle = pair
    prompt = random_tokens(30, seed=1)
    tree = TokenTree(SHAPE, tuple(random_tokens(SHAPE.size, seed=2)))
    with engine.cache.slot() as slot:
        prefill(engine, slot, prompt[:20])
        [logits] = engine.forward([tree_segment(slot, prompt[20:], tree)])
    for node in range(SHAPE.size):
        expected = oracle.logits(prompt + path_tokens(tree, node))
        assert (logits[node] - expected).abs().max() < TOLERANCE
    assert logits.std() > 0.1, "logits this flat prove nothing"


def test_kept_rows_equal_recomputed_ones(pair: tuple[Engine, Oracle]) -> None:
    engine, oracle = pair
    prompt = random_tokens(25, seed=3)
    tree = TokenTree(SHAPE, tuple(random_tokens(SHAPE.size, seed=4)))
    path = (0, 1, 4, 7)  # not the first rows: they have to move
    with engine.cache.slot() as slot:
        prefill(engine, slot, prompt)
        engine.forward([tree_segment(slot, (), tree)])
        slot.keep(path)
        [logits] = engine.forward([chunk_segment(slot, [77], logits=True)])
    expected = oracle.logits([*prompt, *path_tokens(tree, 7), 77])
    assert (logits[0] - expected).abs().max() < TOLERANCE


def test_truncated_rows_are_forgotten(pair: tuple[Engine, Oracle]) -> None:
    engine, oracle = pair
    prompt = random_tokens(25, seed=5)
    with engine.cache.slot() as slot:
        prefill(engine, slot, prompt)
        slot.truncate(10)
        [logits] = engine.forward([chunk_segment(slot, [33, 44], logits=True)])
    assert (logits[0] - oracle.logits([*prompt[:10], 33, 44])).abs().max() < TOLERANCE


def test_packed_batch_of_four_ragged_sessions_equals_four_single_ones(pair: tuple[Engine, Oracle]) -> None:
    engine, _ = pair
    lengths = (3, 31, 18, 1)

    def segments(slots: list[KVSlot]) -> list[Segment]:
        tree = TokenTree(SHAPE, tuple(random_tokens(SHAPE.size, seed=6)))
        chunk = chunk_segment(slots[2], random_tokens(40, seed=7), logits=True)
        single = chunk_segment(slots[3], [9], logits=True)
        return [tree_segment(slots[0], (), tree), tree_segment(slots[1], (8, 9), tree), chunk, single]

    cache = engine.cache
    with cache.slot() as a, cache.slot() as b, cache.slot() as c, cache.slot() as d:
        slots = [a, b, c, d]
        for slot, length in zip(slots, lengths, strict=True):
            prefill(engine, slot, random_tokens(length, seed=length))
        packed = engine.forward(segments(slots))
        single = [engine.forward([segment])[0] for segment in segments(slots)]
    for together, alone in zip(packed, single, strict=True):
        assert (together - alone).abs().max() < TOLERANCE


@contextmanager
def running(engine: Engine) -> Iterator[Executor]:
    with EngineThread() as thread:
        executor = Executor(thread, max_forward_tokens=64)
        executor.engine = engine
        yield executor


async def test_jobs_of_several_sessions_share_forwards_and_keep_their_results_apart(
    pair: tuple[Engine, Oracle],
) -> None:
    engine, oracle = pair

    def job(slot: KVSlot, prompt: list[int]) -> Job[Tensor]:
        yield from feed(slot, tuple(prompt[:-1]), 8)
        logits = yield chunk_segment(slot, prompt[-1:], logits=True)
        return logits[0].clone()

    prompts = [random_tokens(length, seed=length) for length in (5, 40, 23)]
    before = engine.num_forwards
    cache = engine.cache
    with running(engine) as executor, cache.slot() as a, cache.slot() as b, cache.slot() as c:
        jobs = [job(slot, prompt) for slot, prompt in zip((a, b, c), prompts, strict=True)]
        found = await asyncio.gather(*map(executor.run, jobs))
    for logits, prompt in zip(found, prompts, strict=True):
        assert (logits - oracle.logits(prompt)).abs().max() < TOLERANCE
    assert engine.num_forwards - before < 2 + 6 + 4, "every session had its forwards to itself"


async def test_an_error_in_one_job_reaches_its_caller_and_no_other(pair: tuple[Engine, Oracle]) -> None:
    engine, _ = pair

    def failing(slot: KVSlot) -> Job[None]:
        yield chunk_segment(slot, [1, 2, 3], logits=False)
        raise ValueError("mine")

    with running(engine) as executor, engine.cache.slot() as a, engine.cache.slot() as b:
        results = await asyncio.gather(
            executor.run(failing(a)), executor.run(feed(b, (1, 2, 3), 2)), return_exceptions=True
        )
    assert isinstance(results[0], ValueError)
    assert results[1] is None


async def test_an_ordinary_job_overtakes_an_idle_one(pair: tuple[Engine, Oracle]) -> None:
    """Submitted in the midst of the idle job's forwards, so that nothing depends on time."""
    engine, _ = pair
    order: list[str] = []
    submitted: list[Future[None]] = []

    def job(slot: KVSlot, name: str, count: int) -> Job[None]:
        for _ in range(count):
            yield chunk_segment(slot, [5], logits=False)
            order.append(name)
            if order == ["idle"] * 3:
                submitted.append(executor._submit(job(b, "ordinary", 2)))

    with running(engine) as executor, engine.cache.slot() as a, engine.cache.slot() as b:
        await asyncio.wrap_future(executor.run_idle(job(a, "idle", 5)))
        await asyncio.wrap_future(submitted[0])
    assert order == ["idle"] * 3 + ["ordinary"] * 2 + ["idle"] * 2


async def test_an_idle_job_that_is_cancelled_has_no_further_forward(pair: tuple[Engine, Oracle]) -> None:
    """It is cancelled when its second forward is done; the job after it finds that forward's logits used."""
    engine, _ = pair
    used: list[int] = []
    submitted: Future[Future[None]] = Future()

    def job(slot: KVSlot) -> Job[None]:
        for number in range(5):
            yield chunk_segment(slot, [5], logits=False)
            used.append(number)
            if number == 1:
                submitted.result().cancel()

    def nothing() -> Job[tuple[int, ...]]:
        return tuple(used)
        yield

    before = engine.num_forwards
    with running(engine) as executor, engine.cache.slot() as slot:
        submitted.set_result(executor.run_idle(job(slot)))
        await asyncio.gather(asyncio.wrap_future(submitted.result()), return_exceptions=True)
        assert await executor.run(nothing()) == (0, 1)
    assert engine.num_forwards - before == 2


def test_a_slot_too_many_is_refused_and_freed_slots_serve_again(pair: tuple[Engine, Oracle]) -> None:
    cache = pair[0].cache
    with cache.slot(), cache.slot(), cache.slot(), cache.slot():
        with pytest.raises(ResourceExhausted, match="num-slots"), cache.slot():
            pass
        assert cache.num_slots_used == 4
    assert cache.num_slots_used == 0
