"""Every outcome of an experiment with its probability: the shipped walk, its chance replaced by a script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from math import lcm, prod
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.siblings import WholeTarget
from sequoia.engine.verification import Targets, reject_recursively, traverse, walk
from sequoia.topology import DraftDistributions, TokenTree, Topology, Verdict

Context = tuple[int, ...]
Law = tuple[Fraction, ...]
Laws = Callable[[Context], Law]  # context -> the distribution of the next token
Outcome = TypeVar("Outcome")
TargetP = Callable[[int], Tensor]  # node -> p after it, (vocabulary,) float64
Verify = Callable[[TokenTree, TargetP, "Enumerator"], Verdict]


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

    def choose(self, probabilities: Sequence[float]) -> int:
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
        script = _following(source)


def _following(source: Enumerator) -> list[int] | None:
    """The script of the next outcome in lexicographic order."""
    for step in reversed(range(len(source.taken))):
        if source.taken[step] + 1 < source.options[step]:
            return [*source.taken[:step], source.taken[step] + 1]
    return None


class DrawnTokens(Sequence[int]):
    """The tokens of a tree, drawn when they are first looked at: what nobody looks at need not be enumerated."""

    def __init__(self, topology: Topology, q: Laws, source: Enumerator, *, replaces: bool = False) -> None:
        self._topology, self._q, self._source, self._replaces = topology, q, source, replaces
        self._tokens: dict[int, int] = {0: 0}

    def __len__(self) -> int:
        return self._topology.size

    @overload
    def __getitem__(self, node: int) -> int: ...
    @overload
    def __getitem__(self, node: slice) -> Sequence[int]: ...
    def __getitem__(self, node: int | slice) -> int | Sequence[int]:
        assert isinstance(node, int)
        if node not in self._tokens:
            self._draw(node)
        return self._tokens[node]

    def context(self, node: int) -> Context:
        return () if node == 0 else (*self.context(self._topology.parents[node]), self[node])

    def _draw(self, node: int) -> None:
        """By definition: siblings in order, from q without the tokens of the ones before (or, replaced, with them)."""
        parent = self._topology.parents[node]
        left = list(self._q(self.context(parent)))
        for sibling in self._topology.children[parent]:
            if sibling not in self._tokens:
                total = sum(left)
                self._tokens[sibling] = self._source.choose([float(p / total) for p in left])
            if not self._replaces:
                left[self._tokens[sibling]] = Fraction(0)
            if sibling == node:
                return


class QRows:
    """q of every internal node, made when its row is asked for, because it depends on the tokens above it."""

    def __init__(self, tree: TokenTree, q: Laws) -> None:
        self._tree, self._q = tree, q

    def row(self, index: int) -> list[int]:
        law = self._q(self._tree.path_tokens(self._tree.topology.internal_nodes[index]))
        scale = lcm(*(p.denominator for p in law))
        return [int(p * scale) for p in law]

    @property
    def weights(self) -> _Rows:
        return _Rows(lambda index: np.array(self.row(index), dtype=np.float64))

    @property
    def token_ids(self) -> _Rows:
        return _Rows(lambda index: np.arange(len(self.row(index)), dtype=np.uint32))


class _Rows:
    def __init__(self, row: Callable[[int], np.ndarray]) -> None:
        self._row = row

    def __getitem__(self, index: int) -> np.ndarray:
        return self._row(index)


def drawn_tree(topology: Topology, q: Laws, source: Enumerator, *, replaces: bool = False) -> TokenTree:
    """A tree as the drafter grows it for rules that need q; nodes for which q has no token left are not there.

    `replaces` draws siblings independently, as SpecInfer does.
    """
    topology = supported(topology, q)
    return with_q(topology, q, DrawnTokens(topology, q, source, replaces=replaces))


def with_q(topology: Topology, q: Laws, tokens: Sequence[int]) -> TokenTree:
    """A tree of these tokens that says they were drawn from q."""
    tree = TokenTree(topology, tokens)  # type: ignore[arg-type]
    rows: DraftDistributions = QRows(tree, q)  # type: ignore[assignment]
    return TokenTree(topology, tokens, rows)  # type: ignore[arg-type]


def supported(topology: Topology, q: Laws) -> Topology:
    """Without the children for which no context has enough tokens. All contexts of these models have equal supports."""
    most = sum(p > 0 for p in q(()))
    kept: dict[int, int] = {0: 0}
    parents = [-1]
    for node, parent in enumerate(topology.parents[1:], start=1):
        if parent in kept and topology.ranks[node] < most:
            kept[node] = len(parents)
            parents.append(kept[parent])
    return Topology(tuple(parents))


def target_p(tree: TokenTree, p: Laws) -> TargetP:
    return lambda node: torch.tensor([float(each) for each in p(tree.path_tokens(node))], dtype=torch.float64)


def padded_law(
    topology: Topology, p: Laws, emitted: Callable[[Enumerator], Context], vocabulary: int
) -> dict[Context, float]:
    """The law of the next `levels` tokens: those emitted, then the target's own."""
    found: dict[Context, float] = defaultdict(float)
    for probability, tokens in outcomes(emitted):
        for rest in product(range(vocabulary), repeat=topology.levels - len(tokens)):
            block = (*tokens, *rest)
            found[block] += probability * joint(p, block, since=len(tokens))
    return found


def joint(p: Laws, block: Context, since: int = 0) -> float:
    """P(block[since:] | block[:since]) under the target."""
    return prod(float(p(block[:i])[block[i]]) for i in range(since, len(block)))


def total_variation(found: dict[Context, float], topology: Topology, p: Laws, vocabulary: int) -> float:
    blocks = product(range(vocabulary), repeat=topology.levels)
    return sum(abs(found.get(block, 0.0) - joint(p, block)) for block in blocks) / 2


def with_drawn(
    verify: Verify, topology: Topology, p: Laws, q: Laws, *, replaces: bool = False
) -> Callable[[Enumerator], Context]:
    """The tokens of one step over a drawn tree."""

    def emitted(source: Enumerator) -> Context:
        tree = drawn_tree(topology, q, source, replaces=replaces)
        return verify(tree, target_p(tree, p), source).tokens(tree)

    return emitted


def with_top(topology: Topology, p: Laws, q: Laws) -> Callable[[Enumerator], Context]:
    """The q-likeliest tokens as children, and the walk along tokens drawn from p."""

    def emitted(source: Enumerator) -> Context:
        tree = top_tree(topology, q)
        law = target_p(tree, p)
        return walk(tree, lambda node: source.draw(law(node))).tokens(tree)

    return emitted


def top_tree(topology: Topology, q: Laws) -> TokenTree:
    """Children are the q-likeliest tokens, best first; ties go to the smaller id."""
    most = len(q(()))
    tokens: dict[int, int] = {0: 0}
    contexts: dict[int, Context] = {0: ()}
    parents, kept = [-1], {0: 0}
    for node, parent in enumerate(topology.parents[1:], start=1):
        if parent not in kept or topology.ranks[node] >= most:
            continue
        law = q(contexts[parent])
        order = sorted(range(most), key=lambda token: (-law[token], token))
        kept[node] = len(parents)
        parents.append(kept[parent])
        tokens[kept[node]] = order[topology.ranks[node]]
        contexts[node] = (*contexts[parent], tokens[kept[node]])
    return TokenTree(Topology(tuple(parents)), tuple(tokens[node] for node in range(len(parents))))


def specinfer(tree: TokenTree, law: TargetP, source: Enumerator) -> Verdict:
    return reject_recursively(tree, whole(law), source, with_replacement=True)


def whole(law: TargetP) -> Targets:
    return lambda node: WholeTarget(law(node))


def _recursive(tree: TokenTree, law: TargetP, source: Enumerator) -> Verdict:
    return reject_recursively(tree, whole(law), source)


def _traversal(tree: TokenTree, law: TargetP, source: Enumerator) -> Verdict:
    return traverse(tree, whole(law), source)


SEQUOIA: Verify = _recursive
TRAVERSAL: Verify = _traversal
