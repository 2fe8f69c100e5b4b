"""A whole tree as one request to the engine: what is to be grown, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sequoia.engine.children import Calibration, ScoredTokens
from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.trie import Trie
from sequoia.sampling import Sampling
from sequoia.topology import DynamicShape, Int, Topology

# Children proposed under a node of a dynamic tree, at most: as many as q has candidates.
_MOST_CHILDREN = 32


@dataclass(frozen=True)
class WholeTree:
    """A tree to be grown in one turn of the engine, from its root's logits.

    The root's row is the slot's last valid one. Nodes with children that have a token are forwarded level by level,
    into the rows behind it, in level order. The parameters must not depend on the tokens of a path.
    """

    slot: KVSlot
    topology: Topology
    root_logits: Tensor  # (1, padded vocabulary) float32, contiguous
    children: str  # how the rule chooses them: top, coupled or drawn
    sampling: Sampling
    vocab_size: int  # tokens that may be chosen
    num_ranked: int  # tokens a node at most, children and spares
    # For draws: (nodes with children, DRAFT_WIDTH) float64, a row for each of them that has a token, in their order.
    exponentials: NDArray[np.float64] | None = None
    trie: Trie | None = None  # mixed into q; the root's logits may be written over
    vocabulary: DraftVocabulary | None = None  # of the model that grows it, filled in by its engine
    sharpness: float = 1.0  # nothing is scored

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The nodes with children, by depth."""
        return tuple(nodes_by_depth(self.topology))

    @property
    def num_levels(self) -> int:
        """Levels with children."""
        return len(self.levels)

    @property
    def most_nodes(self) -> int:
        """In a forward."""
        return max(map(len, self.levels))


@dataclass(frozen=True, slots=True)
class GrownTree:
    """What each node with children, in level order, may have as children."""

    token_ids: Int  # (nodes, num_ranked), in the order of the ranks; those behind `num_tokens` are any
    num_tokens: Int  # (nodes,); -1: the node has no token, because q had fewer than it takes
    q: tuple[NDArray[np.uint32], NDArray[np.float32]] | None  # for draws: ids and weights (nodes, DRAFT_WIDTH)
    num_forwards: int
    ranking_seconds: float  # that were not spent in forwards
    trie_shares: NDArray[np.float64] | None = None  # (trie nodes,): what `trie.mix` tells of each; 0 where nothing

    @property
    def num_living(self) -> int:
        """Nodes with a token, the root included."""
        return int((self.num_tokens >= 0).sum())

    @property
    def num_forwarded(self) -> int:
        """Nodes that were forwarded."""
        return self.num_living - 1


@dataclass(frozen=True)
class WholeDynamicTree:
    """As a `WholeTree`, one whose shape its scores decide, as `draft_worker.dynamic` has it."""

    slot: KVSlot
    shape: DynamicShape
    root_logits: Tensor  # (1, padded vocabulary) float32, contiguous
    children: str  # how the rule chooses them: top or coupled
    sampling: Sampling  # what the scores are the chances by; its temperature is above 0
    vocab_size: int  # tokens that may be chosen
    num_ranked: int  # tokens a node at most, children and spares
    calibration: Calibration
    trie: Trie | None = None  # mixed into q; the root's logits may be written over
    vocabulary: DraftVocabulary | None = None  # of the model that grows it, filled in by its engine

    @property
    def sharpness(self) -> float:
        """Of its calibration."""
        return self.calibration.sharpness

    @property
    def num_levels(self) -> int:
        """Levels with children, at most."""
        return self.shape.levels - 1

    @property
    def most_nodes(self) -> int:
        """In a forward."""
        return self.shape.width


@dataclass(frozen=True, slots=True)
class GrownDynamicTree:
    """The tree, and what else its growth left behind."""

    parents: list[int]
    token_ids: list[int]  # by node but the root
    forwarded: list[int]  # the node of each row, in their order; -1: it was dropped
    ranked: dict[int, ScoredTokens]  # by node that was forwarded, and the root
    num_forwards: int
    ranking_seconds: float  # that were not spent in forwards
    trie_shares: NDArray[np.float64] | None = None  # as of a `GrownTree`

    @property
    def num_forwarded(self) -> int:
        """Nodes that were forwarded."""
        return len(self.forwarded)


AnyWholeTree: TypeAlias = WholeTree | WholeDynamicTree
AnyGrownTree: TypeAlias = GrownTree | GrownDynamicTree


def most_children(shape: DynamicShape) -> int:
    """Children proposed under a node: no more than the tree could hold, or than are worth a look."""
    return min(shape.size - 1, _MOST_CHILDREN)


def log_limits(shape: DynamicShape) -> tuple[float, float]:
    """The logarithms of its least chance and its least gain."""
    least_chance, least_gain = (
        math.log(each) if each else -math.inf for each in (shape.least_chance, shape.least_gain)
    )
    return least_chance, least_gain


def nodes_by_depth(topology: Topology) -> Iterator[tuple[int, ...]]:
    """Nodes with children, depth by depth, in the order in which a growth comes to them."""
    nodes: tuple[int, ...] = (0,)
    while nodes:
        yield nodes
        children = (child for node in nodes for child in topology.children[node])
        nodes = tuple(child for child in children if topology.children[child])
