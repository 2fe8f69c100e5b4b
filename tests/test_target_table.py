"""Verification that reads once, against the walk that looks node by node, and against exact enumeration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from engines import CACHE_DIR, needs_native
from enumeration import Context, Enumerator, TargetP, drawn_tree, padded_law, supported, target_p, total_variation
from test_exactness import chi_square_z
from test_verification import PAIRS, VOCABULARY, shapes

from sequoia.engine.children import draft_distributions, draw_children
from sequoia.engine.native.library import library
from sequoia.engine.native.targets import native_rows
from sequoia.engine.noise import DRAW_FROM_OTHERS, OTHERS, streams
from sequoia.engine.sampling import (
    Path,
    RandomChoices,
    adjusted_logits,
    coupled_token,
    log_weights,
    target_distribution,
)
from sequoia.engine.siblings import candidates
from sequoia.engine.target_table import ReadTarget, TargetTable, coupled_tokens, log_weights_of_rows, restrict
from sequoia.engine.verification import (
    MakeTarget,
    TargetRows,
    Targets,
    TreeTarget,
    reject_recursively,
    traverse,
    verify_tree,
)
from sequoia.errors import Internal
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DraftDistributions, TokenLogprobs, TokenTree, Topology

TREE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7))
SAMPLINGS = (
    Sampling(),
    Sampling(0.3),
    Sampling(1.1, 0.7),
    Sampling(0.8, 1.0, 5),
    Sampling(1.0, 0.9, 40),
    Sampling(2.0, 0.999),
    Sampling(0.7, 0.8, 30, 0.05),
    Sampling(1.0, 1e-9),
)


def logits_of(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Rounding makes ties."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).round(1)).float()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_many_rows_have_the_weights_of_each(sampling: Sampling) -> None:
    rows = logits_of(12, 300, seed=0).double()
    expected = torch.stack([log_weights(row, sampling) for row in rows])
    torch.testing.assert_close(log_weights_of_rows(rows, sampling), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 3, 256])
@pytest.mark.parametrize("sampling", [Sampling(1.5), Sampling(0.8, 0.9), Sampling(1.0, top_k=5)], ids=str)
def test_coupled_tokens_of_rows_are_those_of_each_row_whoever_races_alone(sampling: Sampling, width: int) -> None:
    """Also where the others win, and where ties decide who is among them."""
    rows, sampling = logits_of(200, 50, seed=4).double(), replace(sampling, seed=9)
    keys, own = torch.from_numpy(streams(9, range(200)))[:, None], torch.tensor([OTHERS, DRAW_FROM_OTHERS])
    found = coupled_tokens(log_weights_of_rows(rows, sampling), keys, own, width).tolist()
    assert found == [coupled_token(row, sampling, position, width) for position, row in enumerate(rows)]
    num_others = [(row > row[token]).sum() >= width for row, token in zip(rows, found, strict=True)]
    assert bool(sum(num_others) > 0) == (width < 5)


class Later:
    """A token that is drawn when somebody asks: what nobody looks at need not be enumerated."""

    def __init__(self, draw: Callable[[], int]) -> None:
        self.draw = draw


def read_targets(tree: TokenTree, law: TargetP, source: Enumerator) -> Targets:
    """Of every node what the table would hold, by the functions that fill it."""

    def target(node: int) -> ReadTarget:
        ids, _ = candidates(tree, node)
        weights = law(node).log()[None]
        restricted, values, outside = restrict(weights, torch.tensor([0]), torch.from_numpy(ids)[None])
        token = Later(lambda: source.draw(restricted[0].exp()))
        return ReadTarget(values[0].numpy(), float(outside[0]), token)  # type: ignore[arg-type]

    return target


VERIFIERS = {"sequoia": reject_recursively, "traversal": traverse}


def assert_exact(rule: str, pair: str, sizes: tuple[int, ...]) -> None:
    p, q = PAIRS[pair]

    def emitted(topology: Topology, source: Enumerator) -> Context:
        tree = drawn_tree(topology, q, source)
        verdict = VERIFIERS[rule](tree, read_targets(tree, target_p(tree, p), source), source)
        bonus = verdict.bonus_token_id
        token_id = bonus.draw() if isinstance(bonus, Later) else bonus
        return (*(tree.token_ids[node] for node in verdict.accepted_nodes), token_id)

    for topology in dict.fromkeys(supported(shape, q) for size in sizes for shape in shapes(size)):
        law = padded_law(topology, p, partial(emitted, topology), VOCABULARY)
        assert total_variation(law, topology, p, VOCABULARY) < 1e-12, topology


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", VERIFIERS)
def test_output_has_exactly_the_targets_law_for_every_shape_up_to_4_nodes(rule: str, pair: str) -> None:
    assert_exact(rule, pair, (1, 2, 3, 4))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", VERIFIERS)
def test_output_has_exactly_the_targets_law_for_every_shape_of_5_nodes(rule: str, pair: str) -> None:
    assert_exact(rule, pair, (5,))


def tree_of(logits: torch.Tensor, topology: Topology, generator: np.random.Generator) -> TokenTree:
    """A tree drawn from the q of other logits, one row a node."""
    q = draft_distributions(logits, Sampling(1.3), width=6)
    tokens = [3] * topology.size
    for node in topology.internal_nodes:
        children = topology.children[node]
        drawn = draw_children(q, node, len(children), generator)
        for child, token in zip(children, drawn, strict=True):
            tokens[child] = token
    rows = list(topology.internal_nodes)
    return TokenTree(topology, tuple(tokens), DraftDistributions(q.token_ids[rows], q.weights[rows]))


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": ((5, 2.0),)}


@pytest.mark.parametrize("penalties", [{}, PENALTIES, {"min_tokens": 3, "stop_token_ids": (1, 2, 4)}], ids=str)
@pytest.mark.parametrize("rule", [GREEDY, COUPLED], ids=lambda rule: rule.name)
def test_verdicts_without_chance_are_those_of_the_lazy_walk(rule: Rule, penalties: dict[str, object]) -> None:
    num_accepted = 0
    for seed in range(40):
        sampling = Sampling(temperature=0.0 if rule is GREEDY else 0.8, num_logprobs=2, **penalties)  # type: ignore[arg-type]
        sampling = replace(sampling, seed=seed if rule is COUPLED else None)
        logits = logits_of(TREE.size, 8, seed)
        tree = tree_of(logits, TREE, np.random.default_rng(seed))
        decoding, choices = Decoding(rule, sampling, 2), RandomChoices(np.random.default_rng(0))
        lazy, at_once = (
            verify_tree(tree, logits, decoding, (9, 9, 3), choices, each) for each in (TargetRows, TargetTable)
        )
        assert (lazy.accepted_nodes, lazy.bonus_token_id) == (at_once.accepted_nodes, at_once.bonus_token_id)
        for ours, theirs in zip(at_once.logprobs, lazy.logprobs, strict=True):
            assert flat(ours) == pytest.approx(flat(theirs), abs=1e-9)
        num_accepted += len(lazy.accepted_nodes)
    assert num_accepted > 20


def flat(logprobs: TokenLogprobs) -> list[float]:
    token_id, raw, processed, top = logprobs[:4]
    return [token_id, raw, processed, *(number for each in top for number in each)]


@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL], ids=lambda rule: rule.name)
def test_the_table_holds_p_at_the_candidates_and_the_mass_of_the_rest(rule: Rule) -> None:
    sampling = Sampling(0.9, 0.95, repetition_penalty=1.2)
    logits = logits_of(TREE.size, 30, seed=1)
    tree = tree_of(logits_of(TREE.size, 30, seed=2), TREE, np.random.default_rng(3))
    table = TargetTable(tree, logits, Decoding(rule, sampling, 1), (9, 3), RandomChoices(np.random.default_rng(0)))
    for node in range(TREE.size):
        path = Path((9, 3), 1, tree.path_tokens(node))
        p = target_distribution(adjusted_logits(logits[node], sampling, path), sampling)
        ids, _ = candidates(tree, node)
        values, outside = table.target(node).at(ids)
        np.testing.assert_allclose(values, p[torch.from_numpy(ids)].numpy(), atol=1e-12)
        assert outside == pytest.approx(1.0 - values.sum(), abs=1e-12)
        if outside > 1e-9:
            assert table.target(node).token_id not in ids.tolist()
            assert p[table.target(node).token_id] > 0.0


def native_target(*arguments: Any) -> TreeTarget:
    return native_rows(library(CACHE_DIR))(*arguments)


MAKERS = [TargetTable, pytest.param(native_target, marks=needs_native)]


@pytest.mark.parametrize("make_target", MAKERS)
@pytest.mark.parametrize("top_k", [0, 9])
@pytest.mark.parametrize("rule", [SEQUOIA, TRAVERSAL, SAMPLE_AND_WALK], ids=lambda rule: rule.name)
def test_first_two_tokens_have_the_targets_joint_law(rule: Rule, top_k: int, make_target: MakeTarget) -> None:
    """Chi-square of 4000 pairs on a vocabulary of 12, of which q holds 6: z above 3.72 is a false alarm of 1e-4.

    The logits of a node depend on its token alone. Seeds are fixed.
    """
    draws, vocabulary, sampling = 4000, 12, Sampling(0.9, top_k=top_k)
    target, draft = logits_of(vocabulary, vocabulary, 5) / 2, logits_of(vocabulary, vocabulary, 6) / 2
    laws = [target_distribution(row.double(), sampling).tolist() for row in target]
    joint = {(a, b): laws[3][a] * laws[a][b] for a in range(vocabulary) for b in range(vocabulary)}
    generator = np.random.default_rng(7)
    choices = RandomChoices(generator)
    topology = Topology((-1, 0, 0, 1, 1, 2))
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        tree = grown(draft, topology, generator)
        rows = target[list(tree.token_ids)]
        tokens = verify_tree(tree, rows, Decoding(rule, sampling, 1), (3,), choices, make_target).tokens(tree)
        second = int(generator.choice(vocabulary, p=laws[tokens[0]]))
        found[(*tokens, second)[:2]] += 1
    assert set(found) <= {pair for pair, p in joint.items() if p > 0.0}
    assert chi_square_z(found, joint, draws) < 3.72


def grown(draft: torch.Tensor, topology: Topology, generator: np.random.Generator) -> TokenTree:
    """A tree whose nodes' q is that of their own token."""
    q = draft_distributions(draft, Sampling(), width=6)
    tokens = [3] * topology.size
    for node in topology.internal_nodes:
        children = topology.children[node]
        for child, token in zip(children, draw_children(q, tokens[node], len(children), generator), strict=True):
            tokens[child] = token
    rows = [tokens[node] for node in topology.internal_nodes]
    return TokenTree(topology, tuple(tokens), DraftDistributions(q.token_ids[rows], q.weights[rows]))


@pytest.mark.parametrize("rule", [GREEDY, SEQUOIA, TRAVERSAL, COUPLED, SAMPLE_AND_WALK], ids=lambda rule: rule.name)
def test_broken_logits_are_an_error_and_never_a_token(rule: Rule) -> None:
    logits = logits_of(1, 8, seed=0)
    logits[0, 5] = torch.nan
    sampling = Sampling(0.0 if rule is GREEDY else 1.0, seed=1 if rule is COUPLED else None)
    with pytest.raises(Internal, match="largest logit is nan"):
        verify_tree(
            TokenTree.root_only(3),
            logits,
            Decoding(rule, sampling, 1),
            (3,),
            RandomChoices(np.random.default_rng(0)),
            TargetTable,
        )


def test_broken_logits_of_a_node_that_nobody_visits_harm_nobody() -> None:
    logits = torch.zeros(2, 8)
    logits[0, 2], logits[1] = 1.0, torch.nan
    tree, decoding = TokenTree(Topology((-1, 0)), (3, 4)), Decoding(GREEDY, Sampling(0.0), 1)
    verdict = verify_tree(tree, logits, decoding, (3,), RandomChoices(np.random.default_rng(0)), TargetTable)
    assert verdict.tokens(tree) == (2,)
