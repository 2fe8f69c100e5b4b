"""A large tree's logits, made where verification comes by: it visits few of the nodes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sequoia.topology import Topology

# Nodes of a tree, at most, whose logits are made in the forward, all at once.
MOST_AT_ONCE = 32
# Made together: a head's weights are read once for all of them, which costs about as much as for one.
_TOGETHER = 16
_MOST_KEPT = 4 * _TOGETHER
# Rows in memory while some more of them are made.
MOST_ROWS = _MOST_KEPT + _TOGETHER


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """What a forward answers for a segment whose logits come later."""

    hidden: Tensor  # (wanted tokens, hidden)
    head: Callable[[Tensor], Tensor]  # (tokens, hidden) -> (tokens, padded vocabulary)


class Logits(Protocol):
    """Of a tree's nodes: a tensor (size, vocabulary), or what makes its rows."""

    @property
    def shape(self) -> Sequence[int]:
        """(size, vocabulary)."""
        ...

    def __getitem__(self, nodes: int | list[int]) -> Tensor:
        """Of one node, (vocabulary,), or of several, (nodes, vocabulary)."""
        ...


class TreeLogits:
    """Rows of `Logits`, some at a time: a node's, and with it those of the nodes below that are likeliest to follow.

    The likeliest are those with the most nodes below them: the tree was planned so. At most 64 rows are kept, so the
    logits of a tree of any size take that much memory (152,000 tokens: 39 MB).
    """

    def __init__(self, topology: Topology, rows: HiddenRows, vocab_size: int) -> None:
        self.shape = (topology.size, vocab_size)
        self._topology, self._rows = topology, rows
        self._kept: dict[int, Tensor] = {}
        self._num_below = _num_below(topology)

    def __getitem__(self, nodes: int | list[int]) -> Tensor:
        """As the protocol has it."""
        if isinstance(nodes, list):
            return torch.stack([self[node] for node in nodes])
        if nodes not in self._kept:
            self._make(nodes)
        return self._kept[nodes]

    def _make(self, node: int) -> None:
        nodes = self._likeliest(node)
        logits = self._rows.head(self._rows.hidden[nodes])[:, : self.shape[1]]
        self._kept |= zip(nodes, logits, strict=True)
        for old in list(self._kept)[:-_MOST_KEPT]:
            del self._kept[old]

    def _likeliest(self, node: int) -> list[int]:
        """The node, and those below it."""
        found: list[int] = []
        reached = [(0, node)]
        while reached and len(found) < _TOGETHER:
            _, nearest = heapq.heappop(reached)
            found.append(nearest)
            for child in self._topology.children[nearest]:
                if child not in self._kept:
                    heapq.heappush(reached, (-self._num_below[child], child))
        return found


def _num_below(topology: Topology) -> list[int]:
    """Of each node, itself included."""
    counts = [1] * topology.size
    for node in range(topology.size - 1, 0, -1):
        counts[topology.parents[node]] += counts[node]
    return counts
