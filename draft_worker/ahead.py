"""Drafting ahead: trees for the likeliest verdicts on a tree, grown while that tree is verified."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from draft_worker.choosing import NUM_SPARES, Chooser, Tokens
from draft_worker.growing import AnyGrowth, begun
from draft_worker.growth import Stem, grow_levels
from draft_worker.mixture import NgramSource
from sequoia.acceptance import PRIOR
from sequoia.engine.children import Calibration
from sequoia.engine.executor import Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.topology import Topology, TreeShape


@dataclass(frozen=True, slots=True)
class Guess:
    """A verdict: the tokens down to `node` are accepted, and one of its spare tokens follows as the bonus token."""

    node: int
    spare: int  # its index


def likely_guesses(topology: Topology, count: int) -> list[Guess]:
    """The likeliest verdicts on a tree of that shape, the likeliest first.

    A spare token stands as if it were one more child, and children are taken to be accepted as `acceptance.PRIOR` has
    it: the whole of the first path and the likeliest token behind it come first, then mostly another end or another
    token of that path.
    """
    chances = [1.0]
    for parent, rank in zip(topology.parents[1:], topology.ranks[1:], strict=True):
        chances.append(chances[parent] * _acceptance(rank))
    options = (
        (chances[node] * _acceptance(len(children) + spare), -node, -spare)
        for node, children in enumerate(topology.children)
        for spare in range(NUM_SPARES)
    )
    return [Guess(-node, -spare) for _, node, spare in heapq.nlargest(count, options)]


class Ahead:
    """Trees for the next step, of the shape of the last one, each for a guess at the verdict on it.

    Exact for every rule. What is guessed follows from the last tree and the draft's logits; the children of an ahead
    tree are chosen as always, those that are drawn with fresh random numbers that nothing else has used. Whether the
    tree is kept depends on the committed tokens and on the shape asked for, which are decided by others who have not
    seen it, and never on its own tokens; and no two guesses are equal, so that there is nothing to select. Given that
    its guess came true, and given all that came before, its children therefore have the law of fresh draws from q.
    Guessing by anything that the ahead tree's own draws decide, or dropping one for what was drawn, would break this.
    The bonus token is guessed to be the likeliest one: a draw from q would be as exact and right less often.

    The rows lie behind those of the last tree, in the order of the forwards: first the leaves that guesses end in, then
    tree after tree. Nothing that may become committed is overwritten, and the slot's length does not change.
    """

    def __init__(
        self,
        slot: KVSlot,
        last: AnyGrowth,
        chooser: Chooser,
        calibration: Calibration,
        num_guesses: int,
        max_num_tokens: int,
        ngrams: NgramSource | None = None,
    ) -> None:
        self._slot, self._last, self._chooser, self._ngrams = slot, last, chooser, ngrams
        self._calibration, self._num_guesses, self._max_num_tokens = calibration, num_guesses, max_num_tokens
        self._has_forwarded_leaves = False
        self._trees: list[AnyGrowth] = []

    @property
    def num_begun(self) -> int:
        """Guesses that a forward was done for; those at the leaves are the first one's."""
        num_begun = sum(bool(tree.forwarded) for tree in self._trees)
        return num_begun or int(self._has_forwarded_leaves)

    def job(self) -> Job[None]:
        """Grow tree after tree. It may end at any forward: what was done until then can be used."""
        last = self._last
        guesses = likely_guesses(last.tree().topology, self._num_guesses)
        leaves = sorted({guess.node for guess in guesses} - {0, *last.forwarded})
        spares = dict(last.spares)
        if leaves:
            logits = yield last.segment(self._slot, leaves)
            # One by one: leaves may be of different depths.
            levels = (last.level(self._chooser, [leaf], logits[row : row + 1]) for row, leaf in enumerate(leaves))
            spares.update((leaf, level.spares[0]) for leaf, level in zip(leaves, levels, strict=True))
            self._has_forwarded_leaves = True
        rows = {node: row for row, node in enumerate((*last.forwarded, *leaves))}
        num_rows = len(last.forwarded) + len(leaves)
        for guess in guesses:
            bonus = spares.get(guess.node, ())[guess.spare : guess.spare + 1]
            if bonus and (growth := self._begin(guess.node, bonus, rows, num_rows)):
                self._trees.append(growth)
                yield from grow_levels(self._slot, growth, self._chooser)
                num_rows += len(growth.forwarded)

    def find(self, committed: Tokens, shape: TreeShape) -> int | None:
        """The number of the guess that came true, if its tree was begun and is of that shape."""
        for number, tree in enumerate(self._trees):
            if tree.forwarded and tree.committed == committed and tree.shape == shape:
                return number
        return None

    def take(self, number: int) -> AnyGrowth:
        """The tree of a guess that came true, finished or not, at its place behind the committed rows."""
        self._trees[number].take_root(self._slot)
        return self._trees[number]

    def _begin(self, node: int, bonus: Tokens, rows: dict[int, int], num_rows: int) -> AnyGrowth | None:
        """None where its tree would reach beyond the context."""
        tree = self._last.tree()
        tokens = tree.path_tokens(node)
        committed = (*self._last.committed, *tokens, *bonus)
        if len(committed) + self._last.shape.levels - 1 > self._max_num_tokens:
            return None
        path_rows = tuple(rows[each] for each in tree.follow(tokens))
        shape = self._last.shape
        mixture = self._ngrams.mixture(committed, shape.levels - 1) if self._ngrams else None
        return begun(shape, committed, self._calibration, Stem(path_rows, num_rows), mixture)


def _acceptance(rank: int) -> float:
    return PRIOR[min(rank, len(PRIOR) - 1)]
