"""Stepping along recorded texts: what any token tree would have committed there, and no model is asked.

Where the target's token at every position is fixed (greedily, or by a seed under `coupled`), so is what a draft
proposes behind the tokens before it. All that a tree meets is then the rank of the target's token among the draft's
ordered children, position by position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sequoia.acceptance import AcceptanceCounts, Rows
from sequoia.topology import Topology

# Of the target's token among the draft's children, one a position; None where it is beyond those recorded.
Ranks = Sequence[int | None]


class Step(NamedTuple):
    """One step: where it begins, the tree it had (fewer levels near the end of the text), and the accepted nodes."""

    start: int
    topology: Topology
    accepted_nodes: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Committed tokens, the bonus token included."""
        return len(self.accepted_nodes) + 1

    @property
    def offered(self) -> list[tuple[int, int]]:
        """The children under the nodes that were reached: (depth of the parent, rank)."""
        reached = (0, *self.accepted_nodes)
        children = self.topology.children
        return [(depth, rank) for depth, node in enumerate(reached) for rank in range(len(children[node]))]

    @property
    def accepted(self) -> list[tuple[int, int]]:
        """Those of them that were accepted."""
        return [(depth, self.topology.ranks[node]) for depth, node in enumerate(self.accepted_nodes)]


def replay(topology: Topology, ranks: Ranks) -> list[Step]:
    """The steps of a text whose tokens have these ranks, to its end.

    As in a live answer of that length, a tree has at most as many levels as there are tokens left. The answer's first
    token is none of them: it comes with the prompt, before the draft is asked.
    """
    steps: list[Step] = []
    start = 0
    while start < len(ranks):
        tree = topology.truncated(len(ranks) - start)
        steps.append(Step(start, tree, _descend(tree, ranks[start : start + tree.levels - 1])))
        start += steps[-1].num_tokens
    return steps


def _descend(tree: Topology, ranks: Ranks) -> tuple[int, ...]:
    nodes: list[int] = []
    for rank in ranks:
        children = tree.children[nodes[-1] if nodes else 0]
        if rank is None or rank >= len(children):
            break
        nodes.append(children[rank])
    return tuple(nodes)


def whole_steps(topology: Topology, ranks: Ranks, num_levels: int) -> list[Step]:
    """The steps that begin so early that no tree of `num_levels` levels would be cut by the end of the text.

    As the last one may go beyond the point up to which steps begin, their mean length is unbiased (Wald's identity).
    """
    last_start = len(ranks) - num_levels
    return [step for step in replay(topology, ranks) if step.start <= last_start]


def count(steps: Iterable[Step]) -> AcceptanceCounts:
    """What the steps offered and accepted, by depth and rank, as a coordinator counts it."""
    seen = list(steps)
    offered = Counter(place for step in seen for place in step.offered)
    accepted = Counter(place for step in seen for place in step.accepted)
    return AcceptanceCounts(_rows(offered), _rows(accepted))


def _rows(counts: Counter[tuple[int, int]]) -> Rows:
    ends: Counter[int] = Counter()
    for depth, rank in counts:
        ends[depth] = max(ends[depth], rank + 1)
    return tuple(
        tuple(counts[depth, rank] for rank in range(ends[depth])) for depth in range(max(ends, default=-1) + 1)
    )
