"""A tree grown by the engine in one turn: all that the host decides is said before, all tokens come at the end."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from draft_worker.growth import NUM_SPARES, Chooser, Growth
from draft_worker.unseen import ReadRanking, read_level
from sequoia.engine.children import DRAFT_WIDTH
from sequoia.engine.executor import Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.whole_tree import GrownTree, WholeTree


def grow_whole(slot: KVSlot, growth: Growth, chooser: Chooser, logits: Tensor) -> Job[None]:
    """Grow the whole tree from its root's logits (1, vocabulary): the tree, its rows and its draws of `grow_levels`."""
    shape, kind = growth.topology, chooser.decoding.rule.children
    draws = _Draws(chooser.generator, len(shape.internal_nodes) if kind == "drawn" else 0)
    num_ranked = NUM_SPARES + max(map(len, shape.children))
    sampling, trie = chooser.decoding.sampling, growth.mixture.trie if growth.mixture else None
    wanted = WholeTree(slot, shape, logits, kind, sampling, chooser.vocab_size, num_ranked, draws.exponentials, trie)
    row = logits[0, : chooser.vocab_size].numpy()
    own = growth.mixture.root_logits(row) if growth.mixture else {}
    grown: GrownTree = yield wanted
    if growth.mixture:
        growth.mixture.compare(own, growth.mixture.root_logits(row), sampling.temperature)
    draws.give_back(grown.num_living)
    ranking = ReadRanking(grown.token_ids, grown.num_tokens, grown.q or ())
    first = 0
    for nodes in wanted.levels:
        rows = [row for row in range(first, first + len(nodes)) if grown.num_tokens[row] >= 0]
        if rows:
            growth.add(read_level(ranking, rows, growth.child_counts(growth.frontier)))
        first += len(nodes)


class _Draws:
    """Exponentials for each node that may draw children, in advance; none where nothing is drawn."""

    def __init__(self, generator: np.random.Generator, num_nodes: int) -> None:
        self._generator, self._num_nodes = generator, num_nodes
        self._before = generator.bit_generator.state
        self.exponentials = generator.standard_exponential((num_nodes, DRAFT_WIDTH)) if num_nodes else None

    def give_back(self, num_used: int) -> None:
        """Leave the generator as if only those had been drawn: what nobody has seen comes again."""
        if self._num_nodes > num_used:
            self._generator.bit_generator.state = self._before
            self._generator.standard_exponential((num_used, DRAFT_WIDTH))
