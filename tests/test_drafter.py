"""The drafter against a model without a cache: its trees, its rows kept over steps, its draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from engines import load_engine
from tiny_models import write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from draft_worker.drafter import DraftLimits, DraftSession
from sequoia.engine.executor import Job
from sequoia.errors import InvalidArgument
from sequoia.rules import GREEDY, SEQUOIA
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import TokenTree, Topology

Result = TypeVar("Result")
TREE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7))
PROMPT = tuple(range(30, 60))
COOL = Sampling(temperature=0.0)


class Bench:
    """A drafter's engine, and the same model as `transformers` runs it."""

    def __init__(self, folder: Path) -> None:
        self.engine = load_engine(folder)
        self._oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @contextmanager
    def session(self, sampling: Sampling, vocab_size: int = 400, seed: int = 0) -> Iterator[DraftSession]:
        limits = DraftLimits(prefill_chunk=8, vocab_size=vocab_size)
        with self.engine.cache.slot() as slot:
            decoding = Decoding(GREEDY if sampling.greedy else SEQUOIA, sampling, 1)
            yield DraftSession(slot, decoding, np.random.default_rng(seed), limits, 200)

    def run(self, job: Job[Result]) -> Result:
        logits = None
        while True:
            try:
                segment = next(job) if logits is None else job.send(logits)
            except StopIteration as end:
                return end.value
            [logits] = self.engine.forward([segment])

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            return self._oracle(torch.tensor([tokens])).logits[0, -1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("draft")
    write_tiny_model(folder, "llama")
    return Bench(folder)


def path_tokens(tree: TokenTree, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node > 0:
        path.append(tree.token_ids[node])
        node = tree.topology.parents[node]
    return tuple(reversed(path))


def assert_top_children(bench: Bench, committed: tuple[int, ...], tree: TokenTree) -> None:
    for node in tree.topology.internal_nodes:
        children = tree.topology.children[node]
        best = bench.logits((*committed, *path_tokens(tree, node))).topk(len(children)).indices.tolist()
        assert [tree.token_ids[child] for child in children] == best


def test_greedy_tree_has_the_models_top_children_at_every_node(bench: Bench) -> None:
    with bench.session(COOL) as session:
        session.commit(0, PROMPT)
        tree = bench.run(session.grow(TREE)).tree
    assert tree.topology == TREE
    assert tree.token_ids[0] == PROMPT[-1]
    assert_top_children(bench, PROMPT, tree)


def test_rows_of_a_tree_that_came_true_serve_the_next_one(bench: Bench) -> None:
    """Accepted path of forwarded nodes and a leaf, a bonus token, then tokens of plain steps, then nothing accepted."""
    with bench.session(COOL) as session:
        committed = PROMPT
        session.commit(0, committed)
        for node, others in ((9, (77,)), (5, (78, 79, 80)), (0, (5,)), (4, (91,))):
            tree = bench.run(session.grow(TREE)).tree
            assert_top_children(bench, committed, tree)
            news = (*path_tokens(tree, node), *others)
            session.commit(len(committed), news)
            committed += news
        assert_top_children(bench, committed, bench.run(session.grow(TREE)).tree)


def test_only_the_tokens_without_rows_are_forwarded(bench: Bench) -> None:
    with bench.session(COOL) as session:
        session.commit(0, PROMPT)
        tree = bench.run(session.grow(TREE)).tree
        session.commit(len(PROMPT), (*path_tokens(tree, 4), 77))
        before = bench.engine.num_forward_tokens
        bench.run(session.grow(Topology.chain(2)))
    assert bench.engine.num_forward_tokens - before == 1


def test_a_tree_of_d_levels_costs_d_minus_one_forwards(bench: Bench) -> None:
    """Also where an accepted leaf and plain tokens have no rows yet: they ride along with the root."""
    with bench.session(COOL) as session:
        session.commit(0, PROMPT)
        tree = bench.run(session.grow(TREE)).tree
        session.commit(len(PROMPT), (*path_tokens(tree, 9), 77, 78))
        before = bench.engine.num_forwards
        bench.run(session.grow(TREE))
    assert bench.engine.num_forwards - before == TREE.levels - 1


def test_sampled_children_are_distinct_and_drawn_from_the_q_that_travels(bench: Bench) -> None:
    with bench.session(Sampling(temperature=0.9, top_p=0.9)) as session:
        session.commit(0, PROMPT)
        tree = bench.run(session.grow(TREE)).tree
    assert tree.q is not None
    assert len(tree.q.weights) == len(tree.topology.internal_nodes)
    for row, node in enumerate(tree.topology.internal_nodes):
        tokens = [tree.token_ids[child] for child in tree.topology.children[node]]
        support = tree.q.token_ids[row][tree.q.weights[row] > 0].tolist()
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) <= set(support)
        p = (bench.logits((*PROMPT, *path_tokens(tree, node))) / 0.9).softmax(0)
        sent = tree.q.weights[row] / tree.q.weights[row].sum()
        wanted = p[tree.q.token_ids[row].astype(np.int64)].numpy()
        np.testing.assert_allclose(sent[sent > 0], (wanted / wanted[sent > 0].sum())[sent > 0], rtol=2**-7)


def test_a_tree_shrinks_where_q_has_fewer_tokens_than_children(bench: Bench) -> None:
    with bench.session(Sampling(temperature=0.9, top_k=2)) as session:
        session.commit(0, PROMPT)
        tree = bench.run(session.grow(Topology((-1, 0, 0, 0, 3)))).tree
    assert tree.topology == Topology((-1, 0, 0))


def test_levels_whose_q_hold_different_numbers_of_tokens_make_one_tree(bench: Bench) -> None:
    with bench.session(Sampling(temperature=0.9, top_p=0.5)) as session:
        session.commit(0, PROMPT)
        tree = bench.run(session.grow(TREE)).tree
    assert tree.q is not None
    assert len({int(count) for count in (tree.q.weights > 0).sum(axis=1)}) > 1
    assert (
        tree.q.weights.shape == tree.q.token_ids.shape == (len(tree.topology.internal_nodes), tree.q.weights.shape[1])
    )


def test_padding_of_the_vocabulary_is_never_proposed(bench: Bench) -> None:
    with bench.session(COOL, vocab_size=50) as session:
        session.commit(0, PROMPT[:10])
        tree = bench.run(session.grow(TREE)).tree
    assert max(tree.token_ids) < 50


def test_committed_tokens_that_contradict_are_refused(bench: Bench) -> None:
    with bench.session(COOL) as session:
        session.commit(0, PROMPT)
        session.commit(len(PROMPT) - 1, (PROMPT[-1], 70))
        with pytest.raises(InvalidArgument, match="base_len"):
            session.commit(len(PROMPT), (71,))
        with pytest.raises(InvalidArgument, match="base_len"):
            session.commit(len(PROMPT) + 5, (71,))
