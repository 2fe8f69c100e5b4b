"""A tree being grown: children chosen by the rule, nodes forwarded level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, stack

from draft_worker.mixture import Mixture
from sequoia.engine.attention import Segment
from sequoia.engine.children import coupled_children, draft_distributions, draw_children, top_children
from sequoia.engine.executor import Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.sampling import Path, adjusted_logits
from sequoia.sampling import Decoding
from sequoia.topology import DraftDistributions, TokenTree, Topology

# The likeliest tokens besides a node's children that are remembered: what may follow when none of those is accepted.
NUM_SPARES = 2
# What a row holds that was forwarded for a node which q had no token for.
DEAD = -1

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """The children chosen under some nodes of one depth, and the q they were drawn from, if the rule needs it."""

    children: tuple[Tokens, ...]  # one tuple a node
    spares: tuple[Tokens, ...]  # the likeliest tokens besides, best first, at most NUM_SPARES a node
    q: DraftDistributions | None = None  # one row a node


def choose_level(
    logits: Tensor,
    decoding: Decoding,
    paths: Sequence[Path],
    counts: Sequence[int],
    generator: np.random.Generator,
    mixture: Mixture | None = None,
) -> Level:
    """The children of nodes of one depth by the rule: `counts[i]` of them, or fewer where q has fewer.

    `logits` are the draft's (nodes, vocabulary); `paths` end with the nodes' own tokens; q is that of the mixture.
    """
    sampling = decoding.sampling
    if sampling.adjusts(paths[0].num_generated):
        rows = zip(logits, paths, strict=True)
        logits = stack([adjusted_logits(row, sampling, path) for row, path in rows])
    if mixture is not None:
        logits = mixture.mixed(logits, [path.drafted for path in paths], sampling.temperature)
    if decoding.rule.children == "drawn":
        q = draft_distributions(logits, sampling)
        drawn = tuple(draw_children(q, row, count, generator) for row, count in enumerate(counts))
        return Level(drawn, tuple(undrawn(q, row, tokens) for row, tokens in enumerate(drawn)), q)
    wanted = [count + NUM_SPARES for count in counts]
    if decoding.rule.children == "coupled":
        ranked = coupled_children(logits, sampling, paths[0].position, wanted)
    else:
        ranked = tuple(top_children(row, count) for row, count in zip(logits, wanted, strict=True))
    both = list(zip(ranked, counts, strict=True))
    return Level(tuple(row[:count] for row, count in both), tuple(row[count:] for row, count in both))


def undrawn(q: DraftDistributions, row: int, drawn: Tokens) -> Tokens:
    """The likeliest tokens of q's row that were not drawn; its candidates stand in descending order."""
    support = q.token_ids[row][q.weights[row] > 0].tolist()
    return tuple(token for token in support if token not in drawn)[:NUM_SPARES]


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


class Growth:
    """A tree being grown over a planned topology. Nodes are numbered as they get their tokens, in level order.

    Its root is the last of `committed`, whose row is the slot's last valid one; with a `stem` the end of `committed` is
    a guess, and the root is a node like the others.
    """

    def __init__(
        self, topology: Topology, committed: Tokens, stem: Stem | None = None, mixture: Mixture | None = None
    ) -> None:
        self.topology, self.committed, self.mixture = topology, committed, mixture
        self._stem = stem
        self._parents, self._tokens = [-1], [committed[-1]]
        self._planned_nodes = [0]  # the planned node behind each grown one
        self._q_rows: list[tuple[np.ndarray, np.ndarray]] = []
        self.forwarded: list[int] = []  # in the order of their rows
        self.spares: dict[int, Tokens] = {}
        self.num_levels_grown = 0
        self.frontier = [0] if topology.size > 1 else []

    def tree(self) -> TokenTree:
        """What is grown so far, with the q rows of the nodes that have children."""
        q = None
        if self._q_rows:
            token_ids, weights = (_stacked(rows) for rows in zip(*self._q_rows, strict=True))
            q = DraftDistributions(token_ids, weights)
        return TokenTree(self._shape, tuple(self._tokens), q)

    def rows_for(self, tokens: Tokens) -> list[int]:
        """KV rows, counted behind the committed ones, that hold a beginning of `tokens`."""
        return [self.forwarded.index(node) for node in self.tree().follow(tokens) if node in self.forwarded]

    def paths(self, nodes: Sequence[int], num_prompt_tokens: int) -> list[Path]:
        """What comes before the children of each node."""
        tree = TokenTree(self._shape, tuple(self._tokens))
        return [Path(self.committed, num_prompt_tokens, tree.path_tokens(node)) for node in nodes]

    def child_counts(self, nodes: Sequence[int]) -> list[int]:
        """Children wanted under each node."""
        return [len(self._planned_children(node)) for node in nodes]

    def add(self, level: Level, forwarded: Sequence[int] | None = None) -> None:
        """Give the frontier's nodes, now forwarded, their children; the next frontier is those that shall have some.

        `forwarded`: what the forward's rows hold, where it had more than the frontier; DEAD for a node that is none.
        """
        grown: list[int] = []
        for index, (node, tokens) in enumerate(zip(self.frontier, level.children, strict=True)):
            self.spares[node] = level.spares[index]
            for planned, token in zip(self._planned_children(node), tokens, strict=False):
                grown.append(len(self._tokens))
                self._parents.append(node)
                self._tokens.append(token)
                self._planned_nodes.append(planned)
            if tokens and level.q is not None:
                self._q_rows.append((level.q.token_ids[index], level.q.weights[index]))
        rows = self.frontier if forwarded is None else forwarded
        self.forwarded += [node for node in rows if node or self._stem]
        self.num_levels_grown += 1
        self.frontier = [node for node in grown if self._planned_children(node)]

    def segment(self, slot: KVSlot, nodes: Sequence[int]) -> Segment:
        """The forward of some nodes, behind the rows of those forwarded before."""
        tokens = tuple(self._tokens[node] for node in nodes)
        return nodes_segment(slot, self._shape, len(self.committed) - 1, tokens, nodes, self.forwarded, self._stem)

    def take_root(self, slot: KVSlot) -> None:
        """The guess came true: the rows of its path and of its root become the slot's next valid ones."""
        assert self._stem is not None
        own = range(self._stem.first_row, self._stem.first_row + len(self.forwarded))
        slot.keep([*self._stem.path_rows, *own])
        slot.truncate(len(self.committed))
        self.forwarded.remove(0)
        self._stem = None

    @property
    def _shape(self) -> Topology:
        return Topology.of(tuple(self._parents))

    @property
    def planned_frontier(self) -> list[int]:
        """The planned nodes behind the frontier's."""
        return [self._planned_nodes[node] for node in self.frontier]

    def _planned_children(self, node: int) -> tuple[int, ...]:
        return self.topology.children[self._planned_nodes[node]]


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as one array, filled up with zeros."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses children for the sessions' rule. `vocab_size`: the draft's padding may lie outside the target's."""

    decoding: Decoding
    vocab_size: int
    generator: np.random.Generator

    def level(self, growth: Growth, nodes: Sequence[int], logits: Tensor) -> Level:
        """The children of some nodes of one depth, whose logits these are."""
        paths = growth.paths(nodes, self.decoding.num_prompt_tokens)
        rows = logits[:, : self.vocab_size]
        counts = growth.child_counts(nodes)
        return choose_level(rows, self.decoding, paths, counts, self.generator, growth.mixture)

    def can_grow_unseen(self, growth: Growth) -> bool:
        """Whether no node's children depend on which tokens lead to it, but for the draft's logits."""
        return not self.decoding.sampling.adjusts(len(growth.committed) - self.decoding.num_prompt_tokens)


def grow_levels(slot: KVSlot, growth: Growth, chooser: Chooser) -> Job[None]:
    """Grow what is missing of the tree, one forward a level."""
    while growth.frontier:
        logits = yield growth.segment(slot, growth.frontier)
        growth.add(chooser.level(growth, growth.frontier, logits))
