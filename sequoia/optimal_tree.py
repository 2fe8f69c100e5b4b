"""The tree of a given size and depth with the most expected tokens per step: F(n, d).

Chen et al. 2024 (arXiv 2402.12374), section 4.1. `acceptance[rank]` is P(child of that rank is the accepted one |
parent reached). Sizes and levels count the root.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sequoia.topology import Topology

Float = NDArray[np.float64]
Int = NDArray[np.int16]
# Rows of the DP's candidate matrix handled at a time: row n has candidates up to n only.
_BLOCK_ROWS = 96


def expected_tokens(topology: Topology, acceptance: Sequence[float]) -> float:
    """F: tokens per step, bonus token included; the sum over the nodes of the acceptance along their path."""
    reached = [1.0] * topology.size
    for node, parent in enumerate(topology.parents[1:], start=1):
        rank = topology.ranks[node]
        reached[node] = reached[parent] * (acceptance[rank] if rank < len(acceptance) else 0.0)
    return math.fsum(reached)


def optimal_tree(acceptance: Sequence[float], size: int, max_levels: int) -> Topology:
    """A tree of exactly `size` nodes and at most `max_levels` levels with the most expected tokens per step.

    Raises ValueError when there is no such tree: too few levels or ranks for that size.
    """
    if _is_monotone(acceptance):
        frontier = best_first(acceptance, size, max_levels)
    else:
        frontier = depth_limited(acceptance, size, max_levels)[-1]
    if size < 1 or max_levels < 1 or not math.isfinite(frontier.tokens[size]):
        raise ValueError(f"no tree of {size} nodes within {max_levels} levels and {len(acceptance)} ranks")
    return frontier.tree(size)


class Frontier(NamedTuple):
    """The optimal trees of all sizes within one number of levels."""

    tokens: Float  # (max_size + 1,) F by size; -inf where there is no tree
    internal: Int  # (max_size + 1, max_levels) nodes with children, by size and depth: the rows of the draft forwards
    tree: Callable[[int], Topology]  # by size


def frontiers(acceptance: Sequence[float], max_size: int, max_levels: int) -> list[Frontier]:
    """The frontiers of 1 to `max_levels` levels."""
    if _is_monotone(acceptance):
        return [best_first(acceptance, max_size, levels) for levels in range(1, max_levels + 1)]
    return depth_limited(acceptance, max_size, max_levels)


def _is_monotone(acceptance: Sequence[float]) -> bool:
    return all(a >= b for a, b in pairwise(acceptance))


def best_first(acceptance: Sequence[float], max_size: int, levels: int) -> Frontier:
    """Take the likeliest node next, `max_size` times: optimal at every size when `acceptance` never increases."""
    nodes: list[_Node] = []
    heap = [_Node(-1.0, 0, 0, -1)]
    while heap and len(nodes) < max_size:
        node = heapq.heappop(heap)
        nodes.append(node)
        if node.depth and node.rank + 1 < len(acceptance):
            above = nodes[node.parent].priority
            heapq.heappush(heap, _Node(above * acceptance[node.rank + 1], node.depth, node.rank + 1, node.parent))
        if acceptance and node.depth + 1 < levels:
            heapq.heappush(heap, _Node(node.priority * acceptance[0], node.depth + 1, 0, len(nodes) - 1))
    tokens = np.full(max_size + 1, -np.inf)
    tokens[1 : len(nodes) + 1] = np.cumsum([-node.priority for node in nodes])
    internal = np.zeros((max_size + 1, levels), np.int16)
    for index, node in enumerate(nodes[1:], start=2):
        internal[index, node.depth - 1] = node.rank == 0
    return Frontier(tokens, internal.cumsum(axis=0, dtype=np.int16), partial(_level_ordered, nodes))


class _Node(NamedTuple):
    """Ordered as the heap wants it: the likeliest first, then the shallowest."""

    priority: float  # minus the probability that the node is accepted
    depth: int
    rank: int
    parent: int  # in the order of taking


def _level_ordered(nodes: list[_Node], size: int) -> Topology:
    children: list[list[int]] = [[] for _ in range(size)]
    for index, node in enumerate(nodes[1:size], start=1):
        children[node.parent].append(index)
    order = [0]
    for index in order:
        order += children[index]
    position = {index: place for place, index in enumerate(order)}
    return Topology((-1, *(position[nodes[index].parent] for index in order[1:])))


def depth_limited(acceptance: Sequence[float], max_size: int, max_levels: int) -> list[Frontier]:
    """Exact dynamic programming for any acceptance vector: the frontiers of 1 to `max_levels` levels.

    With T[n, d, b] the best F of a tree of n nodes, d levels at most and b children at the root:
    T[1, d, 0] = 1;  T[n, d, b] = max over m of T[n - m, d, b - 1] + acceptance[b - 1] * max over j of T[m, d - 1, j].
    """
    root = np.full(max_size + 1, -np.inf)
    root[1:2] = 1.0
    leaf = _Level(root, np.zeros(max_size + 1, np.int16), np.zeros((1, max_size + 1), np.int16))
    levels = [leaf]
    internal = [np.zeros((max_size + 1, max_levels), np.int16)]
    for _ in range(1, max_levels):
        levels.append(_next_level(root, levels[-1].tokens, acceptance))
        internal.append(_internal_nodes(levels[-1], internal[-1]))
    return [
        Frontier(level.tokens, internal[index], partial(_grow, levels[: index + 1]))
        for index, level in enumerate(levels)
    ]


class _Level(NamedTuple):
    """The DP's choices for one limit d on the levels, all by size n."""

    tokens: Float  # (max_size + 1,) max over b of T[n, d, b]
    num_children: Int  # (max_size + 1,) the b that attains it
    share: Int  # (ranks + 1, max_size + 1) nodes m in the subtree of the b-th child, by b


def _next_level(root: Float, below: Float, acceptance: Sequence[float]) -> _Level:
    by_children, shares = [root], [np.zeros(len(root), np.int16)]
    for probability in acceptance[: max(len(root) - 2, 0)]:
        # -inf times 0 would be NaN.
        gain = np.multiply(below, probability, out=np.full_like(below, -np.inf), where=np.isfinite(below))
        tokens, share = _best_split(by_children[-1], gain)
        by_children.append(tokens)
        shares.append(share)
    table = np.stack(by_children)
    num_children = table.argmax(axis=0)
    return _Level(table.max(axis=0), num_children.astype(np.int16), np.stack(shares))


def _best_split(before: Float, gain: Float) -> tuple[Float, Int]:
    """max and argmax over m of before[n - m] + gain[m], for every n."""
    size = len(before)
    best, share = np.full(size, -np.inf), np.zeros(size, np.int16)
    for start in range(0, size, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, size)
        # Row n of the windows is before[n - end + 1 .. n], so that column k stands for m = end - 1 - k.
        padded = np.concatenate([np.full(end - 1 - start, -np.inf), before[:end]])
        candidates = sliding_window_view(padded, end)[: end - start] + gain[end - 1 :: -1]
        column = candidates.argmax(axis=1)
        best[start:end] = candidates[np.arange(end - start), column]
        share[start:end] = end - 1 - column
    return best, share


def _internal_nodes(level: _Level, below: Int) -> Int:
    """(max_size + 1, max_levels) nodes with children, by size and depth."""
    sizes = np.arange(len(below))
    shifted = np.roll(below, 1, axis=1)
    by_children = [np.zeros_like(below)]
    for share in level.share[1:]:
        by_children.append(by_children[-1][sizes - share] + shifted[share])
    internal = np.stack(by_children)[level.num_children, sizes]
    internal[:, 0] = level.num_children > 0
    return internal


def _grow(levels: list[_Level], size: int) -> Topology:
    """Follow the DP's choices from the root, breadth first."""
    parents = [-1]
    subtrees = deque([(0, size, len(levels))])
    while subtrees:
        node, size, num_levels = subtrees.popleft()
        level = levels[num_levels - 1]
        shares = []
        for num_children in range(level.num_children[size], 0, -1):
            shares.append(int(level.share[num_children, size]))
            size -= shares[-1]
        for share in reversed(shares):
            subtrees.append((len(parents), share, num_levels - 1))
            parents.append(node)
    return Topology(tuple(parents))
