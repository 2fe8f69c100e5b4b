"""A tree grown by the engine in one turn: all that the host decides is said before, all tokens come at the end."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from draft_worker.choosing import NUM_SPARES, Chooser, scoring
from draft_worker.dynamic import DynamicGrowth
from draft_worker.growing import AnyGrowth
from draft_worker.planned import PlannedGrowth
from draft_worker.unseen import ReadRanking, read_level
from sequoia.engine.children import DRAFT_WIDTH, Float
from sequoia.engine.executor import Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.trie import Trie
from sequoia.engine.whole_tree import GrownDynamicTree, GrownTree, WholeDynamicTree, WholeTree, most_children


def grow_whole(slot: KVSlot, growth: AnyGrowth, chooser: Chooser, logits: Tensor) -> Job[None]:
    """Grow the whole tree from its root's logits (1, vocabulary): the tree, its rows and its draws of `grow_levels`."""
    if isinstance(growth, DynamicGrowth):
        return _grow_dynamic(slot, growth, chooser, logits)
    return _grow_planned(slot, growth, chooser, logits)


def _grow_dynamic(slot: KVSlot, growth: DynamicGrowth, chooser: Chooser, logits: Tensor) -> Job[None]:
    kind, num_ranked = chooser.decoding.rule.children, most_children(growth.shape) + NUM_SPARES
    sampling = scoring(chooser.decoding)
    grown: GrownDynamicTree = yield WholeDynamicTree(
        slot,
        growth.shape,
        logits,
        kind,
        sampling,
        chooser.vocab_size,
        num_ranked,
        growth.calibration,
        _trie_of(growth),
    )
    _read_shares(growth, grown.trie_shares)
    growth.adopt(grown)


def _grow_planned(slot: KVSlot, growth: PlannedGrowth, chooser: Chooser, logits: Tensor) -> Job[None]:
    shape, kind = growth.shape, chooser.decoding.rule.children
    draws = _Draws(chooser.generator, len(shape.internal_nodes) if kind == "drawn" else 0)
    num_ranked = NUM_SPARES + max(map(len, shape.children))
    sampling, vocab_size, trie = chooser.decoding.sampling, chooser.vocab_size, _trie_of(growth)
    wanted = WholeTree(slot, shape, logits, kind, sampling, vocab_size, num_ranked, draws.exponentials, trie)
    grown: GrownTree = yield wanted
    _read_shares(growth, grown.trie_shares)
    draws.give_back(grown.num_living)
    ranking = ReadRanking(grown.token_ids, grown.num_tokens, grown.q or ())
    first = 0
    for nodes in wanted.levels:
        rows = [row for row in range(first, first + len(nodes)) if grown.num_tokens[row] >= 0]
        if rows:
            growth.add(read_level(ranking, rows, growth.child_counts(growth.frontier)))
        first += len(nodes)


def _trie_of(growth: AnyGrowth) -> Trie | None:
    return growth.mixture.trie if growth.mixture else None


def _read_shares(growth: AnyGrowth, trie_shares: Float | None) -> None:
    if growth.mixture and trie_shares is not None:
        growth.mixture.read(trie_shares[1:])


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
