"""The rules against exact enumeration: every draw of the draft, every choice of the shipped walk."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from math import lcm
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from sequoia.engine.sampling import RandomChoices, Sampling
from sequoia.engine.verification import verify_greedy, verify_sequoia, verify_tree
from sequoia.topology import DraftDistributions, TokenTree, Topology

CASES = json.loads((Path(__file__).parent / "data" / "tree_cases.json").read_text())
MODEL = CASES["models"]["generic"]
VOCABULARY = 3
Context = tuple[int, ...]
Outcome = TypeVar("Outcome")


class Enumerator:
    """Choices that follow a script, then always the first option, so that every outcome can be visited in turn."""

    def __init__(self, script: list[int]) -> None:
        self.taken: list[int] = []
        self.options: list[int] = []
        self.probability = 1.0
        self._script = script

    def accept(self, numerator: float, denominator: float) -> bool:
        ratio = min(1.0, numerator / denominator)
        return self.choose([ratio, 1.0 - ratio]) == 0

    def draw(self, weights: Tensor) -> int:
        return self.choose((weights / weights.sum()).tolist())

    def choose(self, probabilities: list[float]) -> int:
        possible = [option for option, probability in enumerate(probabilities) if probability > 0.0]
        index = self._script[len(self.taken)] if len(self.taken) < len(self._script) else 0
        self.taken.append(index)
        self.options.append(len(possible))
        self.probability *= probabilities[possible[index]]
        return possible[index]


def outcomes(experiment: Callable[[Enumerator], Outcome]) -> Iterator[tuple[float, Outcome]]:
    """Every possible outcome of an experiment with its probability."""
    script: list[int] | None = []
    while script is not None:
        source = Enumerator(script)
        outcome = experiment(source)
        yield source.probability, outcome
        script = following(source)


def following(source: Enumerator) -> list[int] | None:
    """The script of the next outcome in lexicographic order."""
    for step in reversed(range(len(source.taken))):
        if source.taken[step] + 1 < source.options[step]:
            return [*source.taken[:step], source.taken[step] + 1]
    return None


def law(table: str, context: Context) -> list[Fraction]:
    return [Fraction(p) for p in MODEL[table][",".join(map(str, context))]]


def topology_of(shape: list) -> Topology:
    parents, level = [-1], [(0, shape)]
    while level:
        below = []
        for node, children in level:
            for child in children:
                below.append((len(parents), child))
                parents.append(node)
        level = below
    return Topology(tuple(parents))


def contexts_of(topology: Topology, tokens: list[int], node: int) -> Context:
    path: list[int] = []
    while node > 0:
        path.append(tokens[node])
        node = topology.parents[node]
    return tuple(reversed(path))


def drawn_tree(topology: Topology, source: Enumerator) -> TokenTree:
    """Children drawn one after another without replacement from the model's Q, by definition."""
    tokens, rows = [0] * topology.size, []
    for node in topology.internal_nodes:
        q = law("Q", contexts_of(topology, tokens, node))
        scale = lcm(*(p.denominator for p in q))
        rows.append([int(p * scale) for p in q])
        left = list(q)
        for child in topology.children[node]:
            tokens[child] = source.choose([float(p / sum(left)) for p in left])
            left[tokens[child]] = Fraction(0)
    weights = np.array(rows, dtype=np.uint16)
    ids = np.tile(np.arange(VOCABULARY, dtype=np.uint32), (len(rows), 1))
    return TokenTree(topology, tuple(tokens), DraftDistributions(ids, weights))


def emitted(topology: Topology, source: Enumerator) -> Context:
    tree = drawn_tree(topology, source)

    def target_p(node: int) -> Tensor:
        context = contexts_of(topology, list(tree.token_ids), node)
        return torch.tensor([float(p) for p in law("P", context)], dtype=torch.float64)

    return verify_sequoia(tree, target_p, source).tokens(tree)


def joint(block: Context) -> float:
    return float(np.prod([float(law("P", block[:i])[token]) for i, token in enumerate(block)]))


@pytest.mark.parametrize("shape", CASES["shapes"])
def test_sequoia_output_has_exactly_the_targets_law(shape: str) -> None:
    topology = topology_of(CASES["shapes"][shape])
    found: dict[Context, float] = defaultdict(float)
    for probability, tokens in outcomes(lambda source: emitted(topology, source)):
        for rest in product(range(VOCABULARY), repeat=topology.levels - len(tokens)):
            block = (*tokens, *rest)
            found[block] += probability * joint(block) / joint(tokens)
    for block in product(range(VOCABULARY), repeat=topology.levels):
        assert found[block] == pytest.approx(joint(block), abs=1e-12)


SEQUOIA_RESULTS = [result for result in CASES["results"] if result["rule"] == "a recursive w/o repl."]


@pytest.mark.parametrize("case", SEQUOIA_RESULTS, ids=lambda case: case["shape"])
def test_accepted_lengths_follow_the_law_computed_elsewhere(case: dict) -> None:
    topology = topology_of(CASES["shapes"][case["shape"]])
    found: dict[int, float] = defaultdict(float)
    for probability, tokens in outcomes(lambda source: emitted(topology, source)):
        found[len(tokens) - 1] += probability
    for length, expected in case["accepted_len"].items():
        assert found[int(length)] == pytest.approx(float(Fraction(expected)), abs=1e-12)


def test_a_token_with_no_target_probability_is_never_accepted_even_when_the_uniform_number_is_zero() -> None:
    class Zero:
        def random(self) -> float:
            return 0.0

    q = DraftDistributions(np.array([[1]], dtype=np.uint32), np.array([[1]], dtype=np.uint16))
    tree = TokenTree(Topology.chain(2), (0, 1), q)
    p = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    verdict = verify_sequoia(tree, lambda node: p, RandomChoices(Zero()))  # type: ignore[arg-type]
    assert verdict.accepted_nodes == ()
    assert verdict.bonus_token_id == 0


def test_greedy_walk_follows_the_argmax_and_ends_with_the_first_that_is_no_child() -> None:
    tree = TokenTree(Topology((-1, 0, 0, 2)), (9, 5, 6, 7))
    verdict = verify_greedy(tree, lambda node: {0: 6, 2: 7, 3: 4}[node])
    assert verdict.accepted_nodes == (2, 3)
    assert verdict.bonus_token_id == 4


def test_greedy_takes_the_smaller_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0]])
    verdict = verify_tree(
        TokenTree.root_only(0), logits, Sampling(temperature=0.0), RandomChoices(np.random.default_rng(0))
    )
    assert verdict.bonus_token_id == 1
