"""The rules against exact enumeration: every draw of the draft, every choice of the shipped walk.

No sample sizes and no false alarms here: the laws are computed, not estimated, and compared to 1e-12.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from enumeration import (
    SEQUOIA,
    TRAVERSAL,
    Context,
    Enumerator,
    Law,
    Laws,
    Verify,
    drawn_tree,
    outcomes,
    padded_law,
    specinfer,
    supported,
    target_p,
    top_tree,
    total_variation,
    with_drawn,
    with_q,
    with_top,
)

from sequoia.engine.children import draft_distributions
from sequoia.engine.sampling import RandomChoices
from sequoia.engine.verification import walk
from sequoia.sampling import Sampling
from sequoia.topology import DraftDistributions, TokenTree, Topology

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "tree_cases.json").read_text())
NODE_CASES = json.loads((DATA / "acceptance_cases.json").read_text())["vectors"]
VOCABULARY = 3
THIRDS = (Fraction(1, 3),) * 3
RULES: dict[str, Verify] = {"sequoia": SEQUOIA, "traversal": TRAVERSAL}


def case_laws(table: str) -> Laws:
    laws = {
        tuple(map(int, key.split(","))) if key else (): law for key, law in CASES["models"]["generic"][table].items()
    }
    return lambda context: tuple(map(Fraction, laws[context]))


def nested(shape: list) -> Topology:
    parents, level = [-1], [(0, shape)]
    while level:
        below = []
        for node, children in level:
            for child in children:
                below.append((len(parents), child))
                parents.append(node)
        level = below
    return Topology(tuple(parents))


@cache
def shapes(size: int) -> tuple[Topology, ...]:
    """All ordered trees of `size` nodes: 1, 1, 2, 5, 14, 42 for sizes 1 to 6."""

    def forests(num_nodes: int) -> Iterator[list]:
        if num_nodes == 0:
            yield []
        for first in range(1, num_nodes + 1):
            for children in forests(first - 1):
                for rest in forests(num_nodes - first):
                    yield [children, *rest]

    return tuple(nested(forest) for forest in forests(size - 1))


def mixed(context: Context, salt: int) -> Law:
    """Some distribution over three tokens, another one for every context."""
    generator = np.random.default_rng([salt, *context])
    weights = [int(each) for each in generator.integers(1, 9, VOCABULARY)]
    return tuple(Fraction(each, sum(weights)) for each in weights)


def rotated(law: tuple[int, ...], context: Context) -> Law:
    """The same weights for every context, on other tokens."""
    shift = sum(context) + len(context)
    return tuple(Fraction(law[(token + shift) % VOCABULARY], sum(law)) for token in range(VOCABULARY))


def truncated(context: Context, temperature: float) -> Law:
    """q as the drafter sends it: the two likeliest of three tokens, in the weights that travel."""
    logits = torch.tensor([[float(p) for p in mixed(context, 7)]]).log()
    q = draft_distributions(logits, Sampling(temperature), width=2)
    weights = dict(zip(q.token_ids[0].tolist(), q.weights[0].tolist(), strict=True))
    exact = {token: Fraction(weight) for token, weight in weights.items()}
    return tuple(exact.get(token, Fraction(0)) / sum(exact.values()) for token in range(VOCABULARY))


# Pairs of p and q. Within a pair all q have supports of one size, so that every context gives a tree of one shape.
PAIRS: dict[str, tuple[Laws, Laws]] = {
    "mixed": (lambda c: mixed(c, 1), lambda c: mixed(c, 2)),
    "equal": (lambda c: mixed(c, 1), lambda c: mixed(c, 1)),
    "one-hot p": (lambda c: rotated((1, 0, 0), c), lambda c: mixed(c, 2)),
    "one-hot q": (lambda c: mixed(c, 1), lambda c: rotated((0, 1, 0), c)),
    "disjoint": (lambda c: rotated((1, 0, 0), c), lambda c: rotated((0, 2, 3), c)),
    "zero in q": (lambda c: mixed(c, 1), lambda c: rotated((5, 0, 2), c)),
    "zero in p": (lambda c: rotated((5, 0, 2), c), lambda c: mixed(c, 2)),
    "tails": (lambda c: rotated((10**9, 1, 10**5), c), lambda c: rotated((1, 2**30, 2**20), c)),
    "truncated": (lambda c: mixed(c, 1), lambda c: truncated(c, 0.7)),
    "truncated, cold": (lambda c: mixed(c, 1), lambda c: truncated(c, 0.001)),
}


def assert_exact(verify: Verify, pair: str, sizes: tuple[int, ...]) -> None:
    p, q = PAIRS[pair]
    for topology in dict.fromkeys(supported(shape, q) for size in sizes for shape in shapes(size)):
        law = padded_law(topology, p, with_drawn(verify, topology, p, q), VOCABULARY)
        assert total_variation(law, topology, p, VOCABULARY) < 1e-12, topology


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", RULES)
def test_output_has_exactly_the_targets_law_for_every_shape_up_to_5_nodes(rule: str, pair: str) -> None:
    assert_exact(RULES[rule], pair, (1, 2, 3, 4, 5))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rule", RULES)
def test_output_has_exactly_the_targets_law_for_every_shape_of_6_nodes(rule: str, pair: str) -> None:
    assert len(shapes(6)) == 42
    assert_exact(RULES[rule], pair, (6,))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_walk_along_drawn_tokens_is_exact_whatever_the_children(pair: str) -> None:
    p, q = PAIRS[pair]
    for topology in (shape for size in range(1, 7) for shape in shapes(size)):
        law = padded_law(topology, p, with_top(topology, p, q), VOCABULARY)
        assert total_variation(law, topology, p, VOCABULARY) < 1e-12


@pytest.mark.parametrize("pair", PAIRS)
def test_specinfer_is_exact_on_independent_draws(pair: str) -> None:
    p, q = PAIRS[pair]
    for topology in (shape for size in range(1, 5) for shape in shapes(size)):
        law = padded_law(topology, p, with_drawn(specinfer, topology, p, q, replaces=True), VOCABULARY)
        assert total_variation(law, topology, p, VOCABULARY) < 1e-12


def expected_lengths(rule: str) -> list[dict]:
    return [result for result in CASES["results"] if result["rule"] == rule]


def accepted_lengths(emitted: Callable[[Enumerator], Context]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for probability, tokens in outcomes(emitted):
        found[str(len(tokens) - 1)] += probability
    return found


EXPERIMENTS: dict[str, Callable[[Topology, Laws, Laws], Callable[[Enumerator], Context]]] = {
    "a recursive w/o repl.": lambda topology, p, q: with_drawn(SEQUOIA, topology, p, q),
    "e traversal": lambda topology, p, q: with_drawn(TRAVERSAL, topology, p, q),
    "f SpecInfer with repl.": lambda topology, p, q: with_drawn(specinfer, topology, p, q, replaces=True),
    "c top-k children + walk": with_top,
    "b sampled children + walk": lambda topology, p, q: with_drawn(drawn_walk, topology, p, q),
}


def drawn_walk(tree: TokenTree, law: Callable[[int], torch.Tensor], source: Enumerator) -> object:
    return walk(tree, lambda node: source.draw(law(node)))


@pytest.mark.parametrize(
    ("rule", "case"),
    [(rule, case) for rule in EXPERIMENTS for case in expected_lengths(rule)],
    ids=lambda each: each if isinstance(each, str) else each["shape"],
)
def test_accepted_lengths_follow_the_law_computed_elsewhere(rule: str, case: dict) -> None:
    topology = nested(CASES["shapes"][case["shape"]])
    found = accepted_lengths(EXPERIMENTS[rule](topology, case_laws("P"), case_laws("Q")))
    expected = {length: float(Fraction(p)) for length, p in case["accepted_len"].items()}
    assert found == pytest.approx(expected, abs=1e-12)


NODE_RULES = {
    "recursive_without_replacement_no_fallback": SEQUOIA,
    "specinfer_with_replacement": specinfer,
    "sampled_children_walk": drawn_walk,
}


def node_law(case: dict) -> tuple[list[float], list[float]]:
    """(P(child of that rank accepted) by rank, law of the emitted token) of a root with `k` children."""
    p, q = tuple(map(Fraction, case["p"])), tuple(map(Fraction, case["q"]))
    topology = Topology((-1, *[0] * case["k"]))
    accepted, output = [0.0] * case["k"], [0.0] * len(p)
    replaces = case["rule"] == "specinfer_with_replacement"

    def experiment(source: Enumerator) -> tuple[TokenTree, object]:
        if case["rule"] == "topk_children_walk":
            tree = top_tree(topology, lambda context: q)
            return tree, walk(tree, lambda node: source.draw(target_p(tree, lambda context: p)(node)))
        full = topology if replaces else supported(topology, lambda context: q)
        tree = drawn_tree(full, lambda context: q, source, replaces=replaces)
        return tree, NODE_RULES[case["rule"]](tree, target_p(tree, lambda context: p), source)

    for probability, (tree, verdict) in outcomes(experiment):
        output[verdict.tokens(tree)[0]] += probability
        if verdict.accepted_nodes:
            accepted[tree.topology.ranks[verdict.accepted_nodes[0]]] += probability
    return accepted, output


@pytest.mark.parametrize("rule", [*NODE_RULES, "topk_children_walk"])
def test_one_node_accepts_and_emits_as_computed_elsewhere(rule: str) -> None:
    """Where q has no tokens left, the cases of "sampled_children_walk" draw from all others; our drafter draws none."""
    cases = [case for case in NODE_CASES if case["rule"] == rule]
    assert len(cases) == 19
    if rule == "sampled_children_walk":
        cases = [case for case in cases if case["k"] <= sum(p != "0" for p in case["q"])]
    for case in cases:
        accepted, output = node_law(case)
        assert accepted == pytest.approx(case["accept_float"], abs=1e-12), case
        assert output == pytest.approx([float(Fraction(p)) for p in case["output"]], abs=1e-12), case


def sequoia_on_top_children(topology: Topology, p: Laws, q: Laws) -> Callable[[Enumerator], Context]:
    """Wrong: the rule for draws, applied to children that were not drawn."""

    def emitted(source: Enumerator) -> Context:
        tree = with_q(topology, q, top_tree(topology, q).token_ids)
        return SEQUOIA(tree, target_p(tree, p), source).tokens(tree)

    return emitted


def sequoia_in_the_order_of_q(topology: Topology, p: Laws, q: Laws) -> Callable[[Enumerator], Context]:
    """Wrong: siblings tried in the order of q, not in the order in which they were drawn."""

    class Tree:
        def __init__(self, tree: TokenTree) -> None:
            self.topology, self.children, self.internal_nodes = self, self, tree.topology.internal_nodes
            self.token_ids, self.q, self._tree = tree.token_ids, tree.q, tree

        def __getitem__(self, node: int) -> tuple[int, ...]:
            children, law = self._tree.topology.children[node], q(self._tree.path_tokens(node))
            return tuple(sorted(children, key=lambda child: (-law[self.token_ids[child]], self.token_ids[child])))

    def emitted(source: Enumerator) -> Context:
        tree = drawn_tree(topology, q, source)
        return SEQUOIA(Tree(tree), target_p(tree, p), source).tokens(tree)  # type: ignore[arg-type]

    return emitted


BIASED = {
    "! f rule on w/o-repl. draws": lambda topology, p, q: with_drawn(specinfer, topology, p, q),
    "! a on top-k children": sequoia_on_top_children,
    "! a, children re-sorted by q": sequoia_in_the_order_of_q,
}


@pytest.mark.parametrize("variant", BIASED)
@pytest.mark.parametrize("shape", ["2-(2,1)", "chain3"])
def test_a_biased_variant_is_found_out_by_as_much_as_computed_elsewhere(variant: str, shape: str) -> None:
    """The proof of the proof: what is known to be wrong must not pass it."""
    [case] = [each for each in CASES["results"] if (each["rule"], each["shape"]) == (variant, shape)]
    topology, p, q = nested(CASES["shapes"][shape]), case_laws("P"), case_laws("Q")
    law = padded_law(topology, p, BIASED[variant](topology, p, q), VOCABULARY)
    assert total_variation(law, topology, p, VOCABULARY) == pytest.approx(float(Fraction(case["tv"])), abs=1e-12)


def test_traversal_accepts_at_least_as_much_as_recursive_rejection() -> None:
    p, q = PAIRS["mixed"]
    for topology in shapes(5):
        top_down, bottom_up = (
            sum(
                float(length) * probability
                for length, probability in accepted_lengths(with_drawn(rule, topology, p, q)).items()
            )
            for rule in (SEQUOIA, TRAVERSAL)
        )
        assert bottom_up >= top_down - 1e-12


class Zero:
    def random(self) -> float:
        return 0.0


def one_child(token: int) -> TokenTree:
    q = DraftDistributions(np.array([[token]], dtype=np.uint32), np.array([[1]], dtype=np.float32))
    return TokenTree(Topology.chain(2), (0, token), q)


@pytest.mark.parametrize("verify", [SEQUOIA, TRAVERSAL])
def test_a_token_with_no_target_probability_is_never_accepted_even_when_the_uniform_number_is_zero(
    verify: Verify,
) -> None:
    p = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    verdict = verify(one_child(1), lambda node: p, RandomChoices(Zero()))  # type: ignore[arg-type]
    assert verdict.accepted_nodes == ()
    assert verdict.bonus_token_id == 0


@pytest.mark.parametrize("verify", [SEQUOIA, TRAVERSAL])
def test_when_p_and_q_are_equal_up_to_rounding_something_is_still_emitted(verify: Verify) -> None:
    """A residual of rounding errors, down to the smallest numbers there are, neither fails nor divides by zero."""

    class Rejecting:
        def accept(self, numerator: float, denominator: float) -> bool:
            return numerator >= denominator  # whatever can be rejected is

        def draw(self, weights: torch.Tensor) -> int:
            assert bool(weights.isfinite().all())
            return int(weights.argmax())

    q = DraftDistributions(np.array([[0, 1]], dtype=np.uint32), np.array([[1, 2]], dtype=np.float32))
    tree = TokenTree(Topology((-1, 0, 0)), (0, 0, 1), q)
    for tiny in (1e-17, 1e-300, 5e-324, 0.0):
        p = torch.tensor([1 / 3 - 1e-17, 2 / 3, tiny], dtype=torch.float64)
        assert verify(tree, lambda node, p=p: p, Rejecting()).tokens(tree)[-1] in (0, 1, 2)


def test_traversal_of_a_very_deep_tree_needs_no_recursion() -> None:
    levels = 3000
    ids, weights = np.zeros((levels - 1, 1), dtype=np.uint32), np.ones((levels - 1, 1), dtype=np.float32)
    tree = TokenTree(Topology.chain(levels), (0,) * levels, DraftDistributions(ids, weights))
    p = torch.tensor([1.0], dtype=torch.float64)
    verdict = TRAVERSAL(tree, lambda node: p, RandomChoices(np.random.default_rng(0)))
    assert len(verdict.accepted_nodes) == levels - 1


class Recorder:
    """A generator that remembers every number it gave."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(3)
        self.numbers: list[float] = []

    def random(self) -> float:
        self.numbers.append(self._generator.random())
        return self.numbers[-1]


@pytest.mark.parametrize("verify", [SEQUOIA, TRAVERSAL])
def test_two_steps_use_a_fresh_number_for_every_choice(verify: Verify) -> None:
    """Reused noise is the fault of the paper's own repository: its numbers were drawn once and served every step."""
    q = DraftDistributions(np.tile(np.arange(3, dtype=np.uint32), (2, 1)), np.array([[1, 2, 3]] * 2, dtype=np.float32))
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    recorder = Recorder()
    choices = RandomChoices(recorder)  # type: ignore[arg-type]
    counts = []
    for tokens in permutations(range(3), 2):
        tree = TokenTree(Topology((-1, 0, 0, 1)), (0, *tokens, 2), q)
        before = len(recorder.numbers)
        verify(tree, lambda node: p, choices)
        counts.append(len(recorder.numbers) - before)
    assert min(counts) >= 2  # at least one accept and one draw a step
    assert len(set(recorder.numbers)) == sum(counts)


def test_the_walk_follows_the_targets_tokens_and_ends_with_the_first_that_is_no_child() -> None:
    tree = TokenTree(Topology((-1, 0, 0, 2)), (9, 5, 6, 7))
    verdict = walk(tree, lambda node: {0: 6, 2: 7, 3: 4}[node])
    assert verdict.accepted_nodes == (2, 3)
    assert verdict.bonus_token_id == 4
