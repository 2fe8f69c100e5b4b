"""A tree being grown over a shape that was planned before its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from draft_worker.choosing import Chooser, Level, Tokens
from draft_worker.growth import Growth, Stem
from draft_worker.mixture import Mixture
from sequoia.topology import DraftDistributions, TokenTree, Topology


class PlannedGrowth(Growth[Topology]):
    """Nodes are numbered as they get their tokens: fewer than planned where q had fewer tokens than children."""

    def __init__(
        self, shape: Topology, committed: Tokens, stem: Stem | None = None, mixture: Mixture | None = None
    ) -> None:
        super().__init__(shape, committed, stem, mixture)
        self._planned_nodes = [0]  # the planned node behind each grown one
        self._q_rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._spares: dict[int, Tokens] = {}

    @property
    def spares(self) -> Mapping[int, Tokens]:
        """The likeliest tokens besides the children, of each node that was forwarded."""
        return self._spares

    def tree(self) -> TokenTree:
        """What is grown so far, with the q rows of the nodes that have children."""
        q = None
        if self._q_rows:
            token_ids, weights = (_stacked(rows) for rows in zip(*self._q_rows, strict=True))
            q = DraftDistributions(token_ids, weights)
        return TokenTree(self._topology, tuple(self._tokens), q)

    def child_counts(self, nodes: Sequence[int]) -> list[int]:
        """Children wanted under each node."""
        return [len(self._planned_children(node)) for node in nodes]

    def level(self, chooser: Chooser, nodes: Sequence[int], logits: Tensor) -> Level:
        """By the rule."""
        paths = self.paths(nodes, chooser.decoding.num_prompt_tokens)
        return chooser.level(logits, paths, self.child_counts(nodes), self.mixture)

    def add(self, level: Level, forwarded: Sequence[int] | None = None) -> None:
        """Give the frontier's nodes, now forwarded, their children; the next frontier is those that shall have some.

        `forwarded`: what the forward's rows hold, where it had more than the frontier; DEAD for a node that is none.
        """
        grown: list[int] = []
        for index, (node, tokens) in enumerate(zip(self.frontier, level.children, strict=True)):
            self._spares[node] = level.spares[index]
            for planned, token in zip(self._planned_children(node), tokens, strict=False):
                grown.append(len(self._tokens))
                self._parents.append(node)
                self._tokens.append(token)
                self._planned_nodes.append(planned)
            if tokens and level.q is not None:
                self._q_rows.append((level.q.token_ids[index], level.q.weights[index]))
        self._pass(self.frontier if forwarded is None else forwarded)
        self.frontier = [node for node in grown if self._planned_children(node)]

    @property
    def planned_frontier(self) -> list[int]:
        """The planned nodes behind the frontier's."""
        return [self._planned_nodes[node] for node in self.frontier]

    def _planned_children(self, node: int) -> tuple[int, ...]:
        return self.shape.children[self._planned_nodes[node]]


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as one array, filled up with zeros."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])
