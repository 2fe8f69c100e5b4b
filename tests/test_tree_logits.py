"""Logits that are made later: the same as those of the forward, the same verdicts, and few rows in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import load_engine, needs_native
from tiny_models import write_tiny_model
from torch import Tensor

from sequoia.engine.attention import chunk_segment, tree_segment
from sequoia.engine.children import draft_distributions, draw_children
from sequoia.engine.executor import Job
from sequoia.engine.forwards import Engine
from sequoia.engine.sampling import RandomChoices
from sequoia.engine.tree_logits import MOST_AT_ONCE, HiddenRows, TreeLogits
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DraftDistributions, TokenTree, Topology, Verdict
from verify_worker.verifier import VerifyLimits, VerifySession

PROMPT = tuple(range(20, 50))
VOCABULARY = 250
ENGINES = [
    {"dtype": "float32"},
    pytest.param({"dtype": "bfloat16"}, marks=needs_native),
    {"dtype": "float32", "reads_once": True},  # as on a GPU
]


def random_topology(size: int, seed: int) -> Topology:
    """In level order, with some ten nodes a level, six below the root."""
    generator, parents = np.random.default_rng(seed), [-1, *[0] * 6]
    for node in range(len(parents), size):
        parents.append(max(parents[-1], int(generator.integers(max(0, node - 20), node)), 0))
    return Topology(tuple(parents))


TOPOLOGY = random_topology(120, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    write_tiny_model(folder, "llama")
    return folder


@pytest.fixture(params=ENGINES, ids=["lean", "native", "reads once"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return load_engine(folder, **request.param)


def drawn_tree(seed: int) -> TokenTree:
    """From q that has nothing to do with the model."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(size=(TOPOLOGY.size, VOCABULARY)) * 2)
    q = draft_distributions(logits, Sampling(1.3), width=32)
    tokens = [PROMPT[-1]] * TOPOLOGY.size
    for node in TOPOLOGY.internal_nodes:
        children = TOPOLOGY.children[node]
        for child, token in zip(children, draw_children(q, node, len(children), generator), strict=True):
            tokens[child] = token
    rows = list(TOPOLOGY.internal_nodes)
    return TokenTree(TOPOLOGY, tuple(tokens), DraftDistributions(q.token_ids[rows], q.weights[rows]))


def run(engine: Engine, job: Job[Verdict]) -> Verdict:
    answer: Any = None
    while True:
        try:
            segment: Any = next(job) if answer is None else job.send(answer)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict
        [answer] = engine.forward_some([segment])


@torch.inference_mode()
def test_rows_are_those_that_the_forward_had_made(engine: Engine) -> None:
    tree = drawn_tree(0)
    with engine.cache.slot() as slot, engine.cache.slot() as other:
        for each in (slot, other):
            engine.forward([chunk_segment(each, PROMPT, logits=False)])
            each.keep(range(len(PROMPT)))
        chunk = chunk_segment(other, [7, 8], logits=True)
        expected, beside = engine.forward([tree_segment(slot, (), tree), chunk])
        later, beside_later = engine.forward_some([tree_segment(slot, (), tree, logits_later=True), chunk])
    assert isinstance(later, HiddenRows)
    assert isinstance(beside_later, Tensor)
    tolerance = 0.0 if engine.can_grow else 1e-5
    torch.testing.assert_close(beside_later, beside, rtol=0.0, atol=tolerance)
    logits = TreeLogits(TOPOLOGY, later, VOCABULARY)
    for node in np.random.default_rng(1).permutation(TOPOLOGY.size).tolist():
        torch.testing.assert_close(logits[node], expected[node, :VOCABULARY], rtol=0.0, atol=tolerance)
    nodes = [0, 5, 2]
    torch.testing.assert_close(logits[nodes], expected[nodes, :VOCABULARY], rtol=0.0, atol=tolerance)


def longest_path() -> list[int]:
    """From below the root down."""
    path = [int(np.argmax(TOPOLOGY.depths))]
    while TOPOLOGY.parents[path[0]]:
        path.insert(0, TOPOLOGY.parents[path[0]])
    return path


def with_text(tree: TokenTree, root: int, text: tuple[int, ...]) -> TokenTree:
    """The tree with another root, and a text along its longest path."""
    tokens = [root, *tree.token_ids[1:]]
    for node, token in zip(longest_path(), text, strict=False):
        tokens[node] = token
    return TokenTree(tree.topology, tuple(tokens), tree.q)


def verdicts(engine: Engine, decoding: Decoding, seed: int, text: tuple[int, ...], *, can_wait: bool) -> list[Verdict]:
    """Of a tree with that text in it where there is one, else of a drawn tree; and of a plain step after it."""
    limits = VerifyLimits(16, VOCABULARY, engine.make_target_later, engine.make_target_later if can_wait else None)
    choices = RandomChoices(np.random.default_rng(seed))
    with engine.cache.slot() as slot:
        session = VerifySession(slot, PROMPT, decoding, choices, limits, 200)
        drawn = drawn_tree(seed)
        tree = with_text(drawn, PROMPT[-1], text) if text else drawn
        return [run(engine, session.verify(tree)), run(engine, session.verify(session.root_only))]


def plain_text(engine: Engine, decoding: Decoding, seed: int, count: int) -> tuple[int, ...]:
    choices = RandomChoices(np.random.default_rng(seed))
    limits = VerifyLimits(16, VOCABULARY, engine.make_target_later)
    with engine.cache.slot() as slot:
        session = VerifySession(slot, PROMPT, decoding, choices, limits, 200)
        return tuple(run(engine, session.verify(session.root_only)).bonus_token_id for _ in range(count))


@torch.inference_mode()
@pytest.mark.parametrize("rule", [GREEDY, COUPLED, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL], ids=lambda rule: rule.name)
def test_verdicts_are_the_same(engine: Engine, rule: Rule) -> None:
    decoding = Decoding(rule, Sampling(0.0 if rule is GREEDY else 0.9, seed=5, num_logprobs=2), len(PROMPT))
    num_accepted = 0
    for seed in range(16):
        text = () if rule.needs_q else plain_text(engine, decoding, seed, 5)
        expected = verdicts(engine, decoding, seed, text, can_wait=False)
        found = verdicts(engine, decoding, seed, text, can_wait=True)
        assert [(each.accepted_nodes, each.bonus_token_id) for each in found] == [
            (each.accepted_nodes, each.bonus_token_id) for each in expected
        ]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.logprobs is not None
            assert theirs.logprobs is not None
            for own, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert own.processed == pytest.approx(other.processed, abs=1e-4)
        num_accepted += len(found[0].accepted_nodes)
    assert TOPOLOGY.size > MOST_AT_ONCE
    assert num_accepted >= (2 if rule.needs_q else 40)


def test_a_walk_makes_few_rows_and_keeps_few() -> None:
    made: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        made.append(len(hidden))
        return hidden.repeat(1, VOCABULARY)

    rows = HiddenRows(torch.arange(float(TOPOLOGY.size))[:, None], head)
    logits = TreeLogits(TOPOLOGY, rows, VOCABULARY)
    node = 0
    while TOPOLOGY.children[node]:
        assert logits[node][0] == node
        node = TOPOLOGY.children[node][0]
    assert sum(made) <= 48, "along the first children the next rows are there already"
    for each in range(TOPOLOGY.size):
        assert logits[each][0] == each
        assert len(logits._kept) <= 64
