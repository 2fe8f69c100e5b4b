"""Drafting ahead against a model without a cache, and against sessions that never did it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_drafter import COOL, PROMPT, TREE, Bench, assert_top_children, path_tokens
from tiny_models import write_tiny_model

from draft_worker.ahead import Guess, likely_guesses
from draft_worker.drafter import Drafted, DraftSession
from sequoia.engine.executor import Job
from sequoia.loaded_worker import MOST_GUESSES
from sequoia.sampling import Sampling
from sequoia.topology import TokenTree, Topology

WARM = Sampling(temperature=0.9, top_p=0.95)
CHAIN = Topology.chain(4)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Gemma 3's window is shorter than the prompt."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return Bench(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder: Path = tmp_path_factory.mktemp("llama")
    write_tiny_model(folder, "llama")
    return Bench(folder)


def run_some(bench: Bench, job: Job[None], num_forwards: int) -> None:
    """Drop the job at its next forward after so many."""
    segment = next(job)
    for _ in range(num_forwards):
        [logits] = bench.engine.forward([segment])
        segment = job.send(logits)
    job.close()


def guessed(bench: Bench, committed: tuple[int, ...], tree: TokenTree) -> list[tuple[int, ...]]:
    """The tokens of the likeliest verdicts under the greedy rule, from the model without a cache."""
    found = []
    for guess in likely_guesses(tree.topology, MOST_GUESSES):
        path = path_tokens(tree, guess.node)
        ranked = bench.logits((*committed, *path)).argsort(descending=True).tolist()
        found.append((*path, ranked[len(tree.topology.children[guess.node]) + guess.spare]))
    return found


def step(bench: Bench, session: DraftSession, topology: Topology, *tokens: int) -> tuple[Drafted, int]:
    """Commit tokens and grow; also how many forwards that took."""
    session.commit(session.num_committed, tokens)
    before = bench.engine.num_forwards
    drafted = bench.run(session.grow(topology))
    return drafted, bench.engine.num_forwards - before


@pytest.mark.parametrize("number", range(MOST_GUESSES))
@pytest.mark.parametrize("topology", [TREE, CHAIN], ids=["tree", "chain"])
def test_a_verdict_that_was_guessed_is_answered_without_a_forward(
    bench: Bench, topology: Topology, number: int
) -> None:
    """And the trees after it are right too: its rows are where they belong."""
    with bench.session(COOL) as session:
        committed = PROMPT
        tree = step(bench, session, topology, *PROMPT)[0].tree
        for _ in range(3):
            bench.run(session.draft_ahead(MOST_GUESSES))
            tokens = guessed(bench, committed, tree)[number]
            committed += tokens
            drafted, num_forwards = step(bench, session, topology, *tokens)
            tree = drafted.tree
            assert (drafted.hit, drafted.num_levels_saved, num_forwards) == (number, topology.levels - 1, 0)
            assert_top_children(bench, committed, tree)
        drafted, _ = step(bench, session, topology, *path_tokens(tree, topology.size - 1), 77)
        assert_top_children(bench, (*committed, *path_tokens(tree, topology.size - 1), 77), drafted.tree)


@pytest.mark.parametrize("num_forwards", range(1, TREE.levels))
def test_an_unfinished_tree_is_continued(bench: Bench, num_forwards: int) -> None:
    """The first forward is that of the leaves."""
    with bench.session(COOL) as session:
        tree = step(bench, session, TREE, *PROMPT)[0].tree
        run_some(bench, session.draft_ahead(1), num_forwards)
        tokens = guessed(bench, PROMPT, tree)[0]
        drafted, num_missing = step(bench, session, TREE, *tokens)
        assert drafted.num_begun == 1
        assert drafted.num_levels_saved == num_forwards - 1
        assert num_missing == TREE.levels - num_forwards
        assert_top_children(bench, (*PROMPT, *tokens), drafted.tree)


def test_a_guess_that_came_true_is_of_no_use_for_a_tree_of_another_shape(llama: Bench) -> None:
    with llama.session(COOL) as session:
        tree = step(llama, session, TREE, *PROMPT)[0].tree
        llama.run(session.draft_ahead(MOST_GUESSES))
        tokens = guessed(llama, PROMPT, tree)[0]
        drafted, num_forwards = step(llama, session, CHAIN, *tokens)
        assert (drafted.num_begun, drafted.hit, num_forwards) == (MOST_GUESSES, None, CHAIN.levels - 1)
        assert_top_children(llama, (*PROMPT, *tokens), drafted.tree)


def test_more_tokens_than_the_guessed_ones_are_a_miss(llama: Bench) -> None:
    with llama.session(COOL) as session:
        tree = step(llama, session, TREE, *PROMPT)[0].tree
        llama.run(session.draft_ahead(MOST_GUESSES))
        tokens = (*guessed(llama, PROMPT, tree)[0], 88)
        drafted, _ = step(llama, session, TREE, *tokens)
        assert drafted.hit is None
        assert_top_children(llama, (*PROMPT, *tokens), drafted.tree)


@pytest.mark.parametrize("num_forwards", [0, 1, 3, None])
@pytest.mark.parametrize("sampling", [COOL, WARM], ids=["greedy", "sequoia"])
def test_a_miss_leaves_no_trace(bench: Bench, sampling: Sampling, num_forwards: int | None) -> None:
    """Trees, draws, forwards and rows are those of a session that never drafted ahead, wherever it was interrupted."""
    verdicts = ((9, (77,)), (5, (78, 79)), (0, (5,)), (4, (91,)))
    with bench.session(sampling) as ahead, bench.session(sampling) as plain:
        committed = PROMPT
        for session in (ahead, plain):
            session.commit(0, PROMPT)
        for node, others in verdicts:
            trees, num_tokens = [], []
            for session in (ahead, plain):
                before = bench.engine.num_forward_tokens
                trees.append(bench.run(session.grow(TREE)).tree)
                num_tokens.append(bench.engine.num_forward_tokens - before)
            assert_equal(*trees)
            assert num_tokens[0] == num_tokens[1]
            if num_forwards is None:
                bench.run(ahead.draft_ahead(MOST_GUESSES))
            else:
                run_some(bench, ahead.draft_ahead(MOST_GUESSES), num_forwards)
            news = (*path_tokens(trees[0], min(node, trees[0].topology.size - 1)), *others)
            for session in (ahead, plain):
                session.commit(len(committed), news)
            committed += news
        for session in (ahead, plain):
            bench.run(session.grow(TREE))
        torch.testing.assert_close(rows(bench, ahead), rows(bench, plain))


def assert_equal(one: TokenTree, other: TokenTree) -> None:
    assert (one.topology, one.token_ids) == (other.topology, other.token_ids)
    if one.q is not None and other.q is not None:
        np.testing.assert_array_equal(one.q.token_ids, other.q.token_ids)
        np.testing.assert_allclose(one.q.weights, other.q.weights, rtol=2**-7)


def rows(bench: Bench, session: DraftSession) -> torch.Tensor:
    """The keys of the first and the last layer at the committed rows."""
    slot, layers = session._slot, bench.engine.cache.layers
    found = [layer.keys[:, slot.first_row : slot.first_row + slot.length] for layer in (layers[0], layers[-1])]
    return torch.stack(found).clone()


def test_ahead_trees_that_came_true_have_the_law_of_fresh_draws(llama: Bench) -> None:
    """Chi-square of 600 pairs of siblings drawn under the root of an ahead tree, against q without replacement.

    Seeds are fixed; a coin of its own says which of two guesses comes true.
    """
    topology, sampling, draws = Topology((-1, 0, 0)), Sampling(temperature=1.5, top_k=3), 600
    laws: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    found: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
    coin, num_hits = np.random.default_rng(5), 0
    for seed in range(draws):
        with llama.session(sampling, seed=seed) as session:
            tree = step(llama, session, topology, *PROMPT)[0].tree
            llama.run(session.draft_ahead(2))
            tokens = guessed(llama, PROMPT, tree)[int(coin.integers(2))]
            drafted, _ = step(llama, session, topology, *tokens)
        num_hits += drafted.hit is not None
        if tokens not in laws:
            laws[tokens], found[tokens] = pair_law(llama, (*PROMPT, *tokens), sampling), Counter()
        found[tokens][drafted.tree.token_ids[1:]] += 1
    assert num_hits == draws
    statistic, freedom = 0.0, 0
    for tokens, counts in found.items():
        expected = {pair: counts.total() * p for pair, p in laws[tokens].items()}
        assert set(counts) <= set(expected)
        large = [pair for pair in expected if expected[pair] >= 5]
        statistic += sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in large)
        freedom += len(large) - (len(large) == len(expected))
    assert freedom >= 10
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 3.72


def pair_law(bench: Bench, committed: tuple[int, ...], sampling: Sampling) -> dict[tuple[int, ...], float]:
    top = (bench.logits(committed) / sampling.temperature).topk(sampling.top_k)
    q = dict(zip(top.indices.tolist(), top.values.double().softmax(0).tolist(), strict=True))
    return {(a, b): q[a] * q[b] / (1.0 - q[a]) for a in q for b in q if a != b}


@pytest.mark.parametrize(
    "topology",
    [TREE, CHAIN, Topology((-1, *[0] * 9)), Topology((-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, *range(4, 10)))],
    ids=["tree", "chain", "star", "bushy"],
)
def test_all_that_is_forwarded_lies_behind_the_committed_rows_and_within_the_slot(
    llama: Bench, topology: Topology
) -> None:
    """`start_worker` makes room for as many trees as there are guesses, and one more."""
    with llama.session(COOL) as session:
        step(llama, session, topology, *PROMPT)
        job, logits = session.draft_ahead(MOST_GUESSES), None
        written: list[int] = []
        while (segment := next_or_none(job, logits)) is not None:
            assert segment.prefix_len == session.num_committed
            written += range(segment.first_row_written, segment.first_row_written + segment.num_tokens)
            [logits] = llama.engine.forward([segment])
    first = len(PROMPT) + len(topology.internal_nodes) - 1
    assert written == list(range(first, first + len(written)))
    assert max(written) < len(PROMPT) + topology.size * (1 + MOST_GUESSES)


def next_or_none(job: Job[None], logits: torch.Tensor | None):  # type: ignore[no-untyped-def]
    try:
        return next(job) if logits is None else job.send(logits)
    except StopIteration:
        return None


def test_no_tree_is_begun_that_would_reach_beyond_the_context(llama: Bench) -> None:
    """Of 200 tokens: a whole chain, its bonus token and the chain after that just fit behind 193."""
    for num_tokens, hits in ((193, 0), (194, None)):
        with llama.session(COOL) as session:
            tokens = tuple(30 + index % 50 for index in range(num_tokens))
            tree = step(llama, session, CHAIN, *tokens)[0].tree
            llama.run(session.draft_ahead(1))
            drafted, _ = step(llama, session, CHAIN, *guessed(llama, tokens, tree)[0])
            assert drafted.hit == hits


def test_the_whole_path_is_guessed_first_then_other_ends_and_other_tokens() -> None:
    assert likely_guesses(CHAIN, 3) == [Guess(3, 0), Guess(0, 0), Guess(1, 0)]
    guesses = likely_guesses(TREE, TREE.size)
    assert guesses[0] == Guess(9, 0)
    assert len(set(guesses)) == TREE.size
