"""A tree being grown whose shape its own scores decide (EAGLE-2: Li et al. 2024, arXiv 2406.16858)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from draft_worker.choosing import NUM_SPARES, Chooser, Level, Tokens
from draft_worker.growth import DEAD, Growth, Stem
from draft_worker.mixture import Mixture
from sequoia.engine.children import Calibration, ScoredTokens
from sequoia.engine.whole_tree import GrownDynamicTree, log_limits, most_children
from sequoia.topology import DynamicShape


class DynamicGrowth(Growth[DynamicShape]):
    """After every level the nodes of the largest scores are kept, and the others dropped for good.

    A node's score is the logarithm of the chance that the draft gives its path, by its calibration. It falls along a
    path, and of equal ones the nearer node counts as the larger, so that what is kept has its ancestors, and the
    siblings before it. Rows of nodes that were forwarded and dropped stay behind, unseen.
    """

    def __init__(
        self,
        shape: DynamicShape,
        committed: Tokens,
        calibration: Calibration,
        stem: Stem | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__(shape, committed, stem, mixture)
        self.calibration = calibration
        self._scores = [0.0]
        self.ranked: dict[int, ScoredTokens] = {}  # the children and what comes behind them, of nodes forwarded

    @property
    def spares(self) -> Mapping[int, Tokens]:
        """The likeliest tokens besides the children, of each node that was forwarded."""
        counts = [len(children) for children in self._topology.children]
        return {node: ranked.token_ids[counts[node] :][:NUM_SPARES] for node, ranked in self.ranked.items()}

    def child_counts(self, nodes: Sequence[int]) -> list[int]:
        """Children proposed under each node."""
        most = most_children(self.shape)
        return [most if node in self.frontier else 0 for node in nodes]

    def level(self, chooser: Chooser, nodes: Sequence[int], logits: Tensor) -> Level:
        """By the rule, with scores."""
        paths = self.paths(nodes, chooser.decoding.num_prompt_tokens)
        return chooser.scored_level(logits, paths, self.child_counts(nodes), self.calibration.sharpness, self.mixture)

    def add(self, level: Level) -> None:
        """Propose children of the frontier's nodes, now forwarded, keep the best, and find the next frontier."""
        first_new = len(self._tokens)
        for index, (node, tokens) in enumerate(zip(self.frontier, level.children, strict=True)):
            self.ranked[node] = ScoredTokens(tokens + level.spares[index], level.scores[index])
            for token, score in zip(tokens, level.scores[index], strict=False):
                self._parents.append(node)
                self._tokens.append(token)
                self._scores.append(self._scores[node] + score + math.log(self.calibration.hit))
        self._pass(self.frontier)
        least = log_limits(self.shape)[0]
        likely = (node for node in range(1, len(self._tokens)) if self._scores[node] > least)
        kept = [0, *self._best(likely, self.shape.size - 1)]
        self._keep(kept)
        self.frontier = self._following([place for place, node in enumerate(kept) if node >= first_new])

    def adopt(self, grown: GrownDynamicTree) -> None:
        """Take over a tree that the engine grew whole."""
        self._parents, self._tokens = grown.parents, [self.committed[-1], *grown.token_ids]
        self.forwarded, self.ranked = grown.forwarded, grown.ranked
        self.num_levels_grown, self.frontier = grown.num_forwards + 1, []

    def _best(self, nodes: Iterable[int], most: int) -> list[int]:
        """Those of the largest scores, of equal ones the first; ascending."""
        return sorted(sorted(nodes, key=lambda node: -self._scores[node])[:most])

    def _keep(self, kept: Sequence[int]) -> None:
        """Drop the other nodes; those that are kept are numbered anew, in the order they had."""
        place = {node: index for index, node in enumerate(kept)}
        self._parents = [-1, *(place[self._parents[node]] for node in kept[1:])]
        self._tokens = [self._tokens[node] for node in kept]
        self._scores = [self._scores[node] for node in kept]
        self.ranked = {place[node]: ranked for node, ranked in self.ranked.items() if node in place}
        self.forwarded = [place.get(node, DEAD) for node in self.forwarded]

    def _following(self, deepest: Sequence[int]) -> list[int]:
        """The nodes to forward next: when the tree is full, a child of its last one could not displace any other.

        None where all of them together are reached too seldom.
        """
        if self.num_levels_grown == self.shape.levels - 1:
            return []
        least = min(self._scores[1:], default=0.0) if len(self._tokens) == self.shape.size else -math.inf
        following = self._best((node for node in deepest if self._scores[node] > least), self.shape.width)
        chance = sum(math.exp(self._scores[node]) for node in following)
        return following if chance >= self.shape.least_gain else []
