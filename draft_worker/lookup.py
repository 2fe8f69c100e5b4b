"""A drafter without a model: its trees are what the session's own tokens repeat, or their roots alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch

from draft_worker.choosing import Level
from draft_worker.drafter import Drafted, DraftSession, Result, continued
from draft_worker.growing import AnyGrowth, begun
from draft_worker.ngram import NgramIndex, Tokens
from sequoia.engine.children import (
    DRAFT_WIDTH,
    Calibration,
    Float,
    ScoredTokens,
    distributions_of,
    draw_children,
    scored,
)
from sequoia.engine.executor import Executor, Job
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.trie import NOWHERE, Trie
from sequoia.rules import Rule
from sequoia.sampling import Decoding
from sequoia.topology import Int, TreeShape

# Nodes of a trie, at most: more than the trees of a worker have.
_MOST_NODES = 128
# By which races are scored; it is not learnt here.
_CALIBRATION = Calibration(0.8, 1.0)


class LookupSession:
    """One session. q at a node are the weights of the trie's node that its path leads to; elsewhere it has no token.

    Which places the trie is made from follows from the committed tokens, so children are drawn from a q that was fixed
    before: every rule is as exact as with a model's q.
    """

    def __init__(self, decoding: Decoding, generator: np.random.Generator, max_num_tokens: int) -> None:
        self._decoding, self._generator, self._max_num_tokens = decoding, generator, max_num_tokens
        self._index = NgramIndex()
        self._committed: Tokens = ()

    @property
    def num_committed(self) -> int:
        """Committed tokens known, in tokens."""
        return len(self._committed)

    @property
    def rule(self) -> Rule:
        """By which children are chosen."""
        return self._decoding.rule

    def commit(self, base_len: int, token_ids: Tokens) -> None:
        """Take `token_ids` as the committed tokens from `base_len` on. Raises InvalidArgument when they contradict what
        is known, or are too many.
        """
        self._committed = continued(self._committed, base_len, token_ids, self._max_num_tokens)

    def prefill(self) -> Job[None]:
        """Index what is committed."""
        self._index.extend(self._committed)
        yield from ()

    def grow(self, shape: TreeShape) -> Job[Drafted]:
        """The tree of that shape as far as the text has been there before: the root alone where it has not."""
        yield from self.prefill()
        trie = self._index.continuations(self._committed, shape.levels - 1, _MOST_NODES)
        growth = begun(shape, self._committed, _CALIBRATION)
        while trie and growth.frontier:
            growth.add(self._level(trie, growth))
        tree = growth.tree()
        return Drafted(tree, ngram_nodes=tuple(range(1, tree.topology.size)))

    def draft_ahead(self, num_guesses: int) -> Job[None]:
        """Nothing: there is no forward to save."""
        yield from ()

    def _level(self, trie: Trie, growth: AnyGrowth) -> Level:
        """The children of the frontier's nodes by the rule, and what else the growth asks of a level."""
        counts = growth.child_counts(growth.frontier)
        paths = growth.paths(growth.frontier, self._decoding.num_prompt_tokens)
        candidates, spares = [_candidates(trie, trie.find(path.drafted)) for path in paths], ((),) * len(paths)
        if self.rule.children == "drawn":
            q = distributions_of(candidates)
            drawn = tuple(draw_children(q, row, count, self._generator) for row, count in enumerate(counts))
            return Level(drawn, spares, q)
        ranked = [self._ranked(*each, count, paths[0].position) for each, count in zip(candidates, counts, strict=True)]
        return Level(tuple(each.token_ids for each in ranked), spares, scores=tuple(each.scores for each in ranked))

    def _ranked(self, ids: Int, logs: Float, count: int, position: int) -> ScoredTokens:
        if self.rule.children == "top":
            return scored(ids, logs, 1.0, count)
        sampling = self._decoding.sampling
        assert sampling.seed is not None, "the coupled rule needs a seed"
        races = logs + gumbel_noise(sampling.seed, position, torch.from_numpy(ids)).numpy()
        return scored(ids, races, sampling.temperature / _CALIBRATION.sharpness, count)


AnySession: TypeAlias = DraftSession | LookupSession


class Lookup:
    """Opens sessions. Nothing of theirs waits for a turn of the engine."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def run(self, job: Job[Result]) -> Result:
        """The job's result, found beside the other handlers: to index a long prompt takes a quarter of a second."""
        return await asyncio.to_thread(_finished, job)

    @contextmanager
    def session(self, committed: Tokens, decoding: Decoding, max_num_tokens: int) -> Iterator[LookupSession]:
        """A session, as many as there are slots. Raises ResourceExhausted when none is free."""
        with self._executor.engine.cache.slot():
            session = LookupSession(decoding, np.random.default_rng(), max_num_tokens)
            session.commit(0, committed)
            yield session


def _finished(job: Job[Result]) -> Result:
    """The result of a job that wants no forwards."""
    try:
        next(job)
    except StopIteration as end:
        return end.value
    raise AssertionError("there is no model to forward with")


def _candidates(trie: Trie, node: int) -> tuple[Int, Float]:
    """The tokens behind a node of the trie, the heaviest first, and the logarithms of their weights; none NOWHERE."""
    children = {} if node == NOWHERE else trie.children[node]
    ids, nodes = list(children)[:DRAFT_WIDTH], list(children.values())[:DRAFT_WIDTH]
    return np.array(ids, np.int64), np.array([math.log(trie.weights[each]) for each in nodes])
