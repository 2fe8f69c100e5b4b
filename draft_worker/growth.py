"""A tree being grown: what is known of it at any time, and how its nodes are forwarded level by level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from draft_worker.choosing import Chooser, Level, Tokens
from draft_worker.mixture import Mixture
from sequoia.engine.attention import Segment
from sequoia.engine.executor import Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.sampling import Path
from sequoia.topology import TokenTree, Topology, TreeShape

# What a row holds that was forwarded for a node which is not there: q had no token for it, or it was dropped again.
DEAD = -1

Shape = TypeVar("Shape", bound=TreeShape)


@dataclass(frozen=True, slots=True)
class Stem:
    """Where a tree is whose root is not committed: rows counted behind the slot's valid ones."""

    path_rows: tuple[int, ...]  # of the tokens between the last committed one and the root, in this order
    first_row: int  # of the tree's own rows, the root's


def nodes_segment(
    slot: KVSlot,
    shape: Topology,
    root_position: int,
    token_ids: Tokens | Tensor,
    nodes: Sequence[int],
    forwarded: Sequence[int],
    stem: Stem | None = None,
) -> Segment:
    """The forward of some nodes of a tree of that shape, behind the rows of those forwarded before."""
    stem = stem or Stem((), 0)
    path, behind = list(stem.path_rows), np.array([*forwarded, *nodes])
    positions = root_position + np.array(shape.depths)
    visible = np.zeros((len(nodes), stem.first_row + len(behind)), np.bool_)
    visible[:, path] = True
    visible[:, stem.first_row :] = shape.ancestor_mask[np.ix_(np.array(nodes), behind)] & (behind != DEAD)
    row_positions = np.zeros(visible.shape[1], np.int64)
    row_positions[path] = slot.length + np.arange(len(path))
    row_positions[stem.first_row :] = positions[behind]
    first_row, wanted = slot.length + stem.first_row + len(forwarded), tuple(range(len(nodes)))
    return Segment(slot, token_ids, positions[list(nodes)], slot.length, first_row, visible, row_positions, wanted)


class Growth(ABC, Generic[Shape]):
    """A tree being grown, of a shape that is known or that its scores decide. Nodes are numbered in level order.

    Its root is the last of `committed`, whose row is the slot's last valid one; with a `stem` the end of `committed` is
    a guess, and the root is a node like the others.
    """

    def __init__(
        self, shape: Shape, committed: Tokens, stem: Stem | None = None, mixture: Mixture | None = None
    ) -> None:
        self.shape: Shape = shape
        self.committed, self.mixture = committed, mixture
        self._stem = stem
        self._parents, self._tokens = [-1], [committed[-1]]
        self.forwarded: list[int] = []  # in the order of their rows; DEAD where there is no such node
        self.num_levels_grown = 0
        self.frontier = [0] if shape.size > 1 else []

    @property
    @abstractmethod
    def spares(self) -> Mapping[int, Tokens]:
        """The likeliest tokens besides the children, of each node that was forwarded."""

    @abstractmethod
    def child_counts(self, nodes: Sequence[int]) -> list[int]:
        """Children wanted under each node."""

    @abstractmethod
    def level(self, chooser: Chooser, nodes: Sequence[int], logits: Tensor) -> Level:
        """The children of some nodes of one depth, whose logits (nodes, vocabulary) these are."""

    @abstractmethod
    def add(self, level: Level) -> None:
        """Give the frontier's nodes, now forwarded, their children; the next frontier is those that shall have some."""

    def tree(self) -> TokenTree:
        """What is grown so far."""
        return TokenTree(self._topology, tuple(self._tokens))

    def rows_for(self, tokens: Tokens) -> list[int]:
        """KV rows, counted behind the committed ones, that hold a beginning of `tokens`."""
        return [self.forwarded.index(node) for node in self.tree().follow(tokens) if node in self.forwarded]

    def paths(self, nodes: Sequence[int], num_prompt_tokens: int) -> list[Path]:
        """What comes before the children of each node."""
        tree = TokenTree(self._topology, tuple(self._tokens))
        return [Path(self.committed, num_prompt_tokens, tree.path_tokens(node)) for node in nodes]

    def segment(self, slot: KVSlot, nodes: Sequence[int]) -> Segment:
        """The forward of some nodes, behind the rows of those forwarded before."""
        tokens = tuple(self._tokens[node] for node in nodes)
        return nodes_segment(slot, self._topology, len(self.committed) - 1, tokens, nodes, self.forwarded, self._stem)

    def take_root(self, slot: KVSlot) -> None:
        """The guess came true: the rows of its path and of its root become the slot's next valid ones."""
        assert self._stem is not None
        own = range(self._stem.first_row, self._stem.first_row + len(self.forwarded))
        slot.keep([*self._stem.path_rows, *own])
        slot.truncate(len(self.committed))
        self.forwarded.remove(0)
        self._stem = None

    def _pass(self, forwarded: Sequence[int]) -> None:
        """A level is grown; its forward's rows hold these nodes."""
        self.forwarded += [node for node in forwarded if node or self._stem]
        self.num_levels_grown += 1

    @property
    def _topology(self) -> Topology:
        return Topology.of(tuple(self._parents))


def grow_levels(slot: KVSlot, growth: Growth[Any], chooser: Chooser) -> Job[None]:
    """Grow what is missing of the tree, one forward a level."""
    while growth.frontier:
        logits = yield growth.segment(slot, growth.frontier)
        growth.add(growth.level(chooser, growth.frontier, logits))
