"""The tree of a given size and depth with the most expected tokens per step: F(n, d).

Chen et al. 2024 (arXiv 2402.12374), section 4.1; acceptance may depend on depth too. Sizes and levels count the root.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sequoia.topology import Topology

Float = NDArray[np.float64]
Int = NDArray[np.int16]
Nodes = NDArray[np.void]
Node = TypeVar("Node")
# P(the child of that rank is the accepted one | a parent at that depth was reached), by depth and rank; the last row
# serves all deeper parents, and a vector is one row. A rank beyond the end of its row has no node.
Rows = tuple[tuple[float, ...], ...]
Acceptance = Sequence[float] | Sequence[Sequence[float]]
# Rows of the DP's candidate matrix handled at a time: row n has candidates up to n only.
_BLOCK_ROWS = 96


def rows_of(acceptance: Acceptance) -> Rows:
    """The rows by depth of a vector or of rows, which may differ in length; arrays are taken too."""
    is_matrix = isinstance(next(iter(acceptance), None), Sequence | np.ndarray)
    rows = cast(Sequence[Sequence[float]], acceptance if is_matrix else [acceptance])
    return tuple(tuple(map(float, row)) for row in rows)


def expected_tokens(topology: Topology, acceptance: Acceptance) -> float:
    """F: tokens per step, bonus token included; the sum over the nodes of the acceptance along their path."""
    return math.fsum(_walk(topology, rows_of(acceptance))[1])


def derivatives(topology: Topology, acceptance: Acceptance) -> Float:
    """(rows, ranks) of F by every entry of the acceptance, 0 beyond the end of a shorter row.

    An edge counts as often as its parent is reached, times the tokens expected from its child on.
    """
    rows = rows_of(acceptance)
    steps, reached = _walk(topology, rows)
    onward, slopes = [1.0] * topology.size, np.zeros((len(rows), max(map(len, rows))))
    for node in range(topology.size - 1, 0, -1):
        parent, rank = topology.parents[node], topology.ranks[node]
        onward[parent] += steps[node] * onward[node]
        row = min(topology.depths[parent], len(rows) - 1)
        if rank < len(rows[row]):
            slopes[row, rank] += reached[parent] * onward[node]
    return slopes


def _walk(topology: Topology, rows: Rows) -> tuple[list[float], list[float]]:
    """By node: P(accepted | its parent was reached), 0 at a rank without a measurement, and P(accepted)."""
    by_depth = [rows[min(depth, len(rows) - 1)] for depth in range(topology.levels)]
    steps, reached = [1.0], [1.0]
    for parent, depth, rank in zip(topology.parents[1:], topology.depths[1:], topology.ranks[1:], strict=True):
        row = by_depth[depth - 1]
        steps.append(row[rank] if rank < len(row) else 0.0)
        reached.append(reached[parent] * steps[-1])
    return steps, reached


def reached_by_node(topology: Topology, acceptance: Acceptance) -> list[float]:
    """By node: P(the node is accepted), the product of the acceptance along its path."""
    return _walk(topology, rows_of(acceptance))[1]


def optimal_tree(acceptance: Acceptance, size: int, max_levels: int) -> Topology:
    """A tree of exactly `size` nodes and at most `max_levels` levels with the most expected tokens per step.

    Raises ValueError when there is no such tree: too few levels or ranks for that size.
    """
    rows = rows_of(acceptance)
    if min(size, max_levels) >= 1:
        [frontier] = frontiers(rows, size, max_levels, min_levels=max_levels)
        if math.isfinite(frontier.tokens[size]):
            return frontier.tree(size)
    raise ValueError(f"no tree of {size} nodes within {max_levels} levels and {max(map(len, rows))} ranks")


class Frontier(NamedTuple):
    """The optimal trees of all sizes within one number of levels."""

    tokens: Float  # (max_size + 1,) F by size; -inf where there is no tree
    internal: Int  # (max_size + 1, max_levels) nodes with children, by size and depth: the rows of the draft forwards
    tree: Callable[[int], Topology]  # by size


def frontiers(
    acceptance: Acceptance, max_size: int, max_levels: int, *, min_levels: int = 1, max_width: int | None = None
) -> list[Frontier]:
    """The frontiers of `min_levels` to `max_levels` levels; sizes and levels from 1 up.

    With `max_width`, of the trees that have at most so many nodes with children in a level: optimal when no row of
    `acceptance` increases, else good ones.
    """
    rows = rows_of(acceptance)
    if max_width is None and any(a < b for row in rows for a, b in pairwise((1.0, *row))):
        return depth_limited(rows, max_size, max_levels)[min_levels - 1 :]
    taken = _likeliest(rows, max_size, min_levels, max_levels, max_size if max_width is None else max_width)
    return [_within(taken, max_size, levels) for levels in range(min_levels, max_levels + 1)]


def best_first(acceptance: Acceptance, max_size: int, levels: int) -> Frontier:
    """Take the likeliest node next, `max_size` times: optimal at every size when no row of `acceptance` increases."""
    return _within(_likeliest(rows_of(acceptance), max_size, levels, levels, max_size), max_size, levels)


# As a heap wants it: `priority` is minus P(the node is accepted). `parent` is a place in the order of taking.
_NODE = np.dtype([("priority", np.float64), ("depth", np.intp), ("rank", np.intp), ("parent", np.intp)])


def _likeliest(rows: Rows, max_size: int, min_levels: int, max_levels: int, max_width: int) -> Nodes:
    """In order, the nodes that are among the `max_size` likeliest within one of `min_levels` to `max_levels` levels.

    One order serves every limit, less the deeper nodes. The deepest limit is the first to be full.
    """
    taken: list[tuple[float, int, int, int]] = []
    heap = [(-1.0, 0, 0, -1)]
    num_at_depth, levels, room = [0] * max_levels, max_levels, max(max_size, 1)
    while heap and levels >= min_levels:
        priority, depth, rank, parent = node = heapq.heappop(heap)
        if depth >= levels:
            continue
        if depth and rank + 1 < len(row := rows[min(depth, len(rows)) - 1]):
            heapq.heappush(heap, (taken[parent][0] * row[rank + 1], depth, rank + 1, parent))
        # In a level only the likeliest have children: exchanging two subtrees would else gain.
        if depth + 1 < levels and num_at_depth[depth] < max_width and (row := rows[min(depth, len(rows) - 1)]):
            heapq.heappush(heap, (priority * row[0], depth + 1, 0, len(taken)))
        taken.append(node)
        num_at_depth[depth] += 1
        room -= 1
        while levels and not room:
            levels -= 1
            room = num_at_depth[levels]
    return np.array(taken, _NODE)


def _within(taken: Nodes, max_size: int, levels: int) -> Frontier:
    places = np.flatnonzero(taken["depth"] < levels)[:max_size]
    nodes = taken[places]
    tokens = np.full(max_size + 1, -np.inf)
    tokens[1 : len(nodes) + 1] = -nodes["priority"].cumsum()
    internal = np.zeros((max_size + 1, levels), np.int16)
    eldest = np.flatnonzero((nodes["rank"] == 0) & (nodes["depth"] > 0))
    internal[eldest + 1, nodes["depth"][eldest] - 1] = 1
    return Frontier(tokens, internal.cumsum(axis=0, dtype=np.int16), partial(_first_taken, taken, places))


def _first_taken(taken: Nodes, places: NDArray[np.intp], size: int) -> Topology:
    children: defaultdict[int, list[int]] = defaultdict(list)
    for place, parent in zip(places[1:size].tolist(), taken["parent"][places[1:size]].tolist(), strict=True):
        children[parent].append(place)
    return _breadth_first(0, children.__getitem__)


def _breadth_first(root: Node, children: Callable[[Node], Iterable[Node]]) -> Topology:
    nodes, parents = [root], [-1]
    for place, node in enumerate(nodes):
        nodes += children(node)
        parents += [place] * (len(nodes) - len(parents))
    return Topology(tuple(parents))


def depth_limited(acceptance: Acceptance, max_size: int, max_levels: int) -> list[Frontier]:
    """Exact dynamic programming for any acceptance: the frontiers of 1 to `max_levels` levels.

    With T[n, d, b] the best F of a tree of n nodes, d levels at most and b children at the root:
    T[1, d, 0] = 1;  T[n, d, b] = max over m of T[n - m, d, b - 1] + acceptance[b - 1] * max over j of T[m, d - 1, j].
    Each row of the acceptance has a T of its own, and its subtrees have that of the next row.
    """
    rows = rows_of(acceptance)[: max(max_levels - 1, 1)]
    leaf = _leaf(max_size, max_levels)
    tables = list(accumulate([rows[-1]] * (max_levels - len(rows)), _next_level, initial=leaf))
    for row in reversed(rows[:-1]):
        tables = [leaf, *(_next_level(below, row) for below in tables)]
    return [Frontier(each.tokens, each.internal, partial(_chosen, each)) for each in tables]


class _Level(NamedTuple):
    """The DP's choices for one row and one limit d on the levels, all by size n."""

    tokens: Float  # (max_size + 1,) max over b of T[n, d, b]
    internal: Int  # (max_size + 1, max_levels) nodes with children, by depth
    num_children: Int  # (max_size + 1,) the b that attains it
    share: Int  # (ranks + 1, max_size + 1) nodes m in the subtree of the b-th child, by b
    below: tuple[_Level, ...]  # what the subtrees are chosen from: one, or none for a leaf


def _leaf(max_size: int, max_levels: int) -> _Level:
    tokens = np.where(np.arange(max_size + 1) == 1, 1.0, -np.inf)
    none = np.zeros((1, max_size + 1), np.int16)
    return _Level(tokens, np.zeros((max_size + 1, max_levels), np.int16), none[0], none, ())


def _next_level(below: _Level, row: Sequence[float]) -> _Level:
    num_sizes = len(below.tokens)
    by_children = [(_leaf(num_sizes - 1, 1).tokens, np.zeros(num_sizes, np.int16))]
    # Sizes from 1 up to the largest that fits: never -inf, of which 0 times would be NaN.
    subtrees = below.tokens[np.isfinite(below.tokens)]
    for rank, probability in enumerate(row[: max(num_sizes - 2, 0)]):
        num_likelier = sum(each >= probability for each in row[:rank])
        by_children.append(_best_split(by_children[-1][0], probability * subtrees, num_likelier))
    table, share = map(np.stack, zip(*by_children, strict=True))
    best, num_children = table.max(axis=0), table.argmax(axis=0).astype(np.int16)
    internal = _internal_nodes(below.internal, share, num_children)
    return _Level(best, internal * np.isfinite(best)[:, None], num_children, share, (below,))


def _best_split(before: Float, gain: Float, num_likelier: int) -> tuple[Float, Int]:
    """max and argmax over m of before[n - m] + gain[m - 1], for every n.

    Likelier siblings have subtrees at least as large, or an exchange would gain: m <= (n - 1) / (num_likelier + 1). For
    R falling probabilities that is ln(R) / R of the work.
    """
    size = len(before)
    best, share = np.full(size, -np.inf), np.zeros(size, np.int16)
    padded = np.concatenate([np.full(size, -np.inf), before])
    for start in range(num_likelier + 2, size, block := _BLOCK_ROWS * (num_likelier + 1)):
        end = min(start + block, size)
        width = min((end - 1) // (num_likelier + 1), len(gain))
        # Row n of the windows is before[n - width .. n - 1], so that column k stands for m = width - k.
        candidates = sliding_window_view(padded[size + start - width : size + end - 1], width) + gain[width - 1 :: -1]
        column = candidates.argmax(axis=1)
        best[start:end] = candidates[np.arange(end - start), column]
        share[start:end] = width - column
    return best, share


def _internal_nodes(below: Int, share: Int, num_children: Int) -> Int:
    """(max_size + 1, max_levels) nodes with children, by size and depth."""
    sizes, shifted = np.arange(len(below)), np.roll(below, 1, axis=1)
    by_children = [np.zeros_like(below)]
    for each in share[1 : num_children.max() + 1]:
        by_children.append(by_children[-1][sizes - each] + shifted[each])
    internal = np.stack(by_children)[num_children, sizes]
    internal[:, 0] = num_children > 0
    return internal


def _chosen(level: _Level, size: int) -> Topology:
    return _breadth_first((level, size), _subtrees)


def _subtrees(tree: tuple[_Level, int]) -> list[tuple[_Level, int]]:
    level, size = tree
    shares = []
    for num_children in range(level.num_children[size], 0, -1):
        shares.append(int(level.share[num_children, size]))
        size -= shares[-1]
    return [(below, share) for below in level.below for share in reversed(shares)]
