"""Continuations that were read elsewhere than in a draft model, and their mixture with what the model says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sequoia.topology import TokenTree

# Where a node of a tree stands that no path of the trie leads to.
NOWHERE = -1


@dataclass(frozen=True)
class Trie:
    """Continuations of some tokens: flat and in level order, root first, as a tree's topology is.

    `weights` are a token's share among its siblings, `lengths` how many tokens before a node's children were found
    again, the node's own among them. `trust` in [0, 1) is what the node's children weigh beside the model's q; none
    where there is no model.
    """

    parents: tuple[int, ...]
    token_ids: tuple[int, ...]
    weights: tuple[float, ...]
    lengths: tuple[int, ...]
    trust: tuple[float, ...] = ()

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """Of each node: the child by its token, the heaviest first."""
        children: list[dict[int, int]] = [{} for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent][self.token_ids[node]] = node
        return tuple(children)

    def find(self, tokens: Sequence[int]) -> int:
        """The node that `tokens` lead to from the root, or NOWHERE."""
        node = 0
        for token in tokens:
            node = self.children[node].get(token, NOWHERE)
            if node == NOWHERE:
                break
        return node

    def nodes_on(self, tree: TokenTree) -> tuple[int, ...]:
        """The nodes of a tree, ascending and without the root, whose paths are paths of the trie too."""
        standing = [0]
        for node, parent in enumerate(tree.topology.parents[1:], start=1):
            above = standing[parent]
            standing.append(NOWHERE if above == NOWHERE else self.children[above].get(tree.token_ids[node], NOWHERE))
        return tuple(node for node, place in enumerate(standing) if node and place != NOWHERE)

    @cached_property
    def log_odds(self) -> tuple[float, ...]:
        """Of each node but the root: ln(a w / (1 - a)), a the trust in its parent and w its weight; 0 for the root."""
        below = zip(self.parents[1:], self.weights[1:], strict=True)
        return (0.0, *(math.log(self.trust[parent] * weight / (1.0 - self.trust[parent])) for parent, weight in below))


def mix(logits: NDArray[np.floating], trie: Trie, node: int, temperature: float) -> dict[int, float]:
    """Make a row of logits (vocabulary,) those of (1 - a) softmax(logits / temperature) + a w, in place.

    a is the trust in `node`, w are the weights of its children. Up to a constant this raises the logits of their tokens
    and leaves all others as they are. Tokens outside the vocabulary and impossible ones stay so. Returns of each token
    that was raised the share of its probability that is the trie's.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        return {}
    mass = peak / temperature + math.log(np.exp((logits - peak) / np.float32(temperature)).sum())
    shares = {}
    for token, child in trie.children[node].items():
        if token < len(logits) and logits[token] > -math.inf:
            added = mass + trie.log_odds[child]
            raised = np.logaddexp(logits[token] / temperature, added)
            logits[token] = raised * temperature
            shares[token] = math.exp(added - raised)
    return shares
