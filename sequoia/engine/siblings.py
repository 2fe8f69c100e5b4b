"""The children of a node under rejection: what is left of p and of q as one child after the other is refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sequoia.engine.sampling import Choices
from sequoia.topology import TokenTree

Reals = NDArray[np.float64]
Ids = NDArray[np.int64]


class Target(Protocol):
    """p after a node, as rejection needs it."""

    def at(self, ids: Ids) -> tuple[Reals, float]:
        """p at the candidates of the node's q, and the mass of all other tokens."""
        ...

    def draw(self, ids: Ids, values: Reals, scale: float, choices: Choices) -> int:
        """A token whose weight is values[k] if it is the candidate ids[k], and scale times p otherwise."""
        ...


@dataclass(frozen=True, slots=True)
class WholeTarget:
    """Of p itself, (vocabulary,) float64, on any device: it is looked at where the walk comes by."""

    p: Tensor

    def at(self, ids: Ids) -> tuple[Reals, float]:
        """As the protocol has it."""
        candidates = torch.from_numpy(ids).to(self.p.device)
        outside = float(self.p.index_fill(0, candidates, 0.0).sum()) if len(ids) else 1.0
        values: Reals = self.p[candidates].cpu().numpy()
        return values, outside

    def draw(self, ids: Ids, values: Reals, scale: float, choices: Choices) -> int:
        """As the protocol has it."""
        weights = self.p * scale
        weights[torch.from_numpy(ids).to(weights.device)] = torch.from_numpy(values).to(weights.device)
        return choices.draw(weights)


class Siblings:
    """R, which begins as p, and D, which begins as q.

    R is kept as its values at q's candidates and, elsewhere, as a multiple of p: a rejection then costs q's width and
    not the vocabulary's.
    """

    def __init__(self, tree: TokenTree, node: int, target: Target) -> None:
        self._tree, self._children, self._target = tree, tree.topology.children[node], target
        self._ids, self._draft = candidates(tree, node)
        self._columns = {int(token): column for column, token in enumerate(self._ids)}
        self._values, self._outside = target.at(self._ids)
        self._scale = 1.0

    def __iter__(self) -> Iterator[int]:
        return iter(self._children)

    def target(self, child: int) -> float:
        """R at the child's token."""
        return float(self._values[self._column(child)])

    def draft(self, child: int) -> float:
        """D at the child's token: above 0, because it was drawn from D."""
        return float(self._draft[self._column(child)])

    def reject(self, weight: float) -> float:
        """R = norm(max(weight R - D, 0)); returns the new weight z / (z + 1 - weight), where z is the mass before norm.

        0 when weight R and D are equal up to rounding, so that nothing is left to draw from: R then stays as it is.
        """
        values = np.maximum(weight * self._values - self._draft, 0.0)
        mass = float(values.sum()) + weight * self._scale * self._outside
        if mass < sys.float_info.min:
            return 0.0
        self._values, self._scale = values / mass, weight * self._scale / mass
        return mass / (mass + (1.0 - weight))

    def remove(self, child: int) -> None:
        """Take the child's token out of D: the next one was drawn from what is left."""
        self._draft[self._column(child)] = 0.0
        if (mass := self._draft.sum()) > 0.0:
            self._draft /= mass

    def draw(self, choices: Choices) -> int:
        """The bonus token, from R."""
        return self._target.draw(self._ids, self._values, self._scale, choices)

    def _column(self, child: int) -> int:
        return self._columns[self._tree.token_ids[child]]


def candidates(tree: TokenTree, node: int) -> tuple[Ids, Reals]:
    """The tokens of the q that a node's children were drawn from, and their probabilities; none for a leaf."""
    if not tree.topology.children[node]:
        return np.empty(0, np.int64), np.empty(0)
    assert tree.q is not None, "the rule needs q"
    row = tree.topology.internal_nodes.index(node)
    support = tree.q.weights[row] > 0
    weights = tree.q.weights[row][support].astype(np.float64)
    return tree.q.token_ids[row][support].astype(np.int64), weights / math.fsum(weights)
