"""Trees grown where the logits are: those of the host, node for node, and so are the steps after them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import load_engine
from tiny_models import write_tiny_model

from draft_worker.drafter import DraftLimits, DraftSession
from draft_worker.growth import DEAD
from sequoia.engine.executor import Job
from sequoia.engine.forwards import Engine
from sequoia.loaded_worker import MOST_GUESSES
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import TokenTree, Topology

PROMPT = tuple(range(30, 60))
SHAPES = {
    "tree": Topology((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    "chain": Topology.chain(5),
    "star": Topology((-1, *[0] * 9)),
    "parents out of order": Topology((-1, 0, 0, 0, 2, 1, 3, 2, 6, 5, 4)),
    "third child goes on": Topology((-1, 0, 0, 0, 3, 3, 3, 6, 4)),
    "root": Topology.root_only(),
}
WARM = Sampling(0.9, top_p=0.95)
KINDS: dict[str, tuple[Rule, Sampling]] = {
    "greedy": (GREEDY, Sampling(0.0)),
    "sample_and_walk": (SAMPLE_AND_WALK, WARM),
    "coupled": (COUPLED, replace(WARM, seed=3)),
    "coupled, two candidates": (COUPLED, replace(WARM, top_k=2, seed=3)),
    "drawn": (SEQUOIA, WARM),
    "drawn, two candidates": (SEQUOIA, replace(WARM, top_k=2)),
    "drawn, one candidate": (SEQUOIA, replace(WARM, top_k=1)),
    "penalised": (COUPLED, replace(WARM, seed=3, repetition_penalty=1.3)),
    "min_tokens": (GREEDY, Sampling(0.0, min_tokens=40, stop_token_ids=(9,))),
}


class SameNumbers:
    """For every row the same exponentials, so that dead nodes, which cost some, shift nobody's draws."""

    def __init__(self, seed: int) -> None:
        self._row = np.random.default_rng(seed).standard_exponential(64)

    def standard_exponential(self, shape: int | tuple[int, int]) -> np.ndarray:
        count, width = (1, shape) if isinstance(shape, int) else shape
        rows = np.tile(self._row[:width], (count, 1))
        return rows[0] if isinstance(shape, int) else rows

    def spawn(self, count: int) -> list[Any]:
        return [self] * count


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param, num_layers=2)
    return load_engine(folder, engine="graphs")


def run(engine: Engine, job: Job[Any]) -> Any:
    logits = None
    with torch.inference_mode():
        while True:
            try:
                segment = next(job) if logits is None else job.send(logits)
            except StopIteration as end:
                return end.value
            [logits] = engine.forward([segment])


def session(slot: Any, kind: str, generator: Any, *, reads_once: bool) -> DraftSession:
    limits = DraftLimits(prefill_chunk=8, vocab_size=400, reads_once=reads_once)
    rule, sampling = KINDS[kind]
    found = DraftSession(slot, Decoding(rule, sampling, 1), generator, limits, 200)
    found.commit(0, PROMPT)
    return found


def assert_equal(ours: TokenTree, theirs: TokenTree) -> None:
    assert (ours.topology, ours.token_ids) == (theirs.topology, theirs.token_ids)
    assert (ours.q is None) == (theirs.q is None)
    if ours.q is not None and theirs.q is not None:
        np.testing.assert_array_equal(ours.q.token_ids, theirs.q.token_ids)
        np.testing.assert_array_equal(ours.q.weights, theirs.q.weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_four_steps_are_those_that_the_host_grows(engine: Engine, kind: str, shape: str) -> None:
    """With an inner node accepted, then the last one, then none, and what rides along."""
    with engine.cache.slot() as a, engine.cache.slot() as b:
        unseen, seen = (session(slot, kind, SameNumbers(7), reads_once=x) for slot, x in ((a, True), (b, False)))
        committed = len(PROMPT)
        for node, others in ((4, (77,)), (99, (78, 79)), (0, (5,)), (1, (91,))):
            ours, theirs = (run(engine, each.grow(SHAPES[shape])).tree for each in (unseen, seen))
            assert_equal(ours, theirs)
            news = (*ours.path_tokens(min(node, ours.topology.size - 1)), *others)
            for each in (unseen, seen):
                each.commit(committed, news)
            committed += len(news)


def test_with_a_real_generator_draws_are_the_same_where_nothing_is_dead(engine: Engine) -> None:
    with engine.cache.slot() as a, engine.cache.slot() as b:
        trees = [
            run(engine, session(slot, "drawn", np.random.default_rng(3), reads_once=x).grow(SHAPES["tree"])).tree
            for slot, x in ((a, True), (b, False))
        ]
    assert_equal(*trees)


def test_missing_children_and_all_below_them_are_forwarded_and_dropped(engine: Engine) -> None:
    with engine.cache.slot() as slot:
        found = session(slot, "drawn, two candidates", np.random.default_rng(3), reads_once=True)
        tree = run(engine, found.grow(SHAPES["tree"])).tree
        assert tree.topology == Topology((-1, 0, 0, 1, 1, 2, 3, 3, 6))
        found.commit(len(PROMPT), (*tree.path_tokens(1), 77))
        tree = run(engine, found.grow(SHAPES["third child goes on"])).tree
        assert tree.topology == Topology((-1, 0, 0))
        assert found._last is not None
        assert found._last.forwarded == [DEAD] * 3


@pytest.mark.parametrize("number", range(MOST_GUESSES))
@pytest.mark.parametrize("kind", ["greedy", "coupled, two candidates"])
def test_trees_ahead_of_an_unseen_one_come_true_as_ahead_of_a_seen_one(engine: Engine, kind: str, number: int) -> None:
    with engine.cache.slot() as a, engine.cache.slot() as b:
        pair = [session(slot, kind, np.random.default_rng(3), reads_once=x) for slot, x in ((a, True), (b, False))]
        committed = len(PROMPT)
        for _ in range(2):
            hits = []
            for each in pair:
                run(engine, each.grow(SHAPES["tree"]))
                run(engine, each.draft_ahead(MOST_GUESSES))
                assert each._ahead is not None
                hits.append(each._ahead._trees[number].committed[committed:])
            assert hits[0] == hits[1]
            for each in pair:
                each.commit(committed, hits[0])
            committed += len(hits[0])
            ours, theirs = (run(engine, each.grow(SHAPES["tree"])) for each in pair)
            assert ours.hit == theirs.hit == number
            assert_equal(ours.tree, theirs.tree)
            for each in pair:
                each.commit(committed, (50,))
            committed += 1
