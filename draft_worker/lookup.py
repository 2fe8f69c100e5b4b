"""A drafter without a model: its trees are what the session's own tokens repeat, or their roots alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch

from draft_worker.drafter import Drafted, DraftSession, Result, continued
from draft_worker.ngram import NgramIndex, Tokens
from sequoia.engine.children import DRAFT_WIDTH, Float, distributions_of, draw_children
from sequoia.engine.executor import Executor, Job
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.trie import Trie
from sequoia.sampling import Decoding
from sequoia.topology import DraftDistributions, Int, TokenTree, Topology

# Nodes of a trie, at most: more than the trees of a worker have.
_MOST_NODES = 128


class LookupSession:
    """One session. q at a node are the weights of the trie's node that its path leads to; elsewhere it has no token.

    Which places the trie is made from follows from the committed tokens, so children are drawn from a q that was fixed
    before: every rule is as exact as with a model's q.
    """

    def __init__(self, decoding: Decoding, generator: np.random.Generator) -> None:
        self._decoding, self._generator = decoding, generator
        self._index = NgramIndex()
        self._committed: Tokens = ()

    @property
    def num_committed(self) -> int:
        """Committed tokens known, in tokens."""
        return len(self._committed)

    def commit(self, base_len: int, token_ids: Tokens) -> None:
        """Take `token_ids` as the committed tokens from `base_len` on. Raises InvalidArgument when they contradict."""
        self._committed = continued(self._committed, base_len, token_ids)

    def prefill(self) -> Job[None]:
        """Index what is committed."""
        self._index.extend(self._committed)
        yield from ()

    def grow(self, topology: Topology) -> Job[Drafted]:
        """The tree of that topology as far as the text has been there before: the root alone where it has not."""
        yield from self.prefill()
        trie = self._index.continuations(self._committed, topology.levels - 1, _MOST_NODES)
        tree = self._tree(topology, trie) if trie else TokenTree.root_only(self._committed[-1])
        return Drafted(tree, ngram_nodes=tuple(range(1, tree.topology.size)))

    def draft_ahead(self, num_guesses: int) -> Job[None]:
        """Nothing: there is no forward to save."""
        yield from ()

    def _tree(self, topology: Topology, trie: Trie) -> TokenTree:
        """Node by node in level order; `planned` is the topology's node behind each, `standing` the trie's."""
        parents, tokens, planned, standing, rows = [-1], [self._committed[-1]], [0], [0], []
        for node, behind in enumerate(planned):
            wanted = topology.children[behind]
            if not wanted or not trie.children[standing[node]]:
                continue
            position = self.num_committed + topology.depths[behind]
            children, q = self._choose(trie, standing[node], len(wanted), position)
            rows.append(q)
            parents += [node] * len(children)
            tokens += children
            planned += wanted[: len(children)]
            standing += [trie.children[standing[node]][token] for token in children]
        return TokenTree(Topology.of(tuple(parents)), tuple(tokens), _stacked(rows) if self._is_drawn else None)

    @property
    def _is_drawn(self) -> bool:
        return self._decoding.rule.children == "drawn"

    def _choose(self, trie: Trie, node: int, count: int, position: int) -> tuple[Tokens, DraftDistributions | None]:
        """The children of a tree's node by the rule, and the q (one row) that they were drawn from."""
        ids, logs = _candidates(trie, node)
        if self._is_drawn:
            q = distributions_of([(ids, logs)])
            return draw_children(q, 0, count, self._generator), q
        if (seed := self._decoding.sampling.seed) is not None and self._decoding.rule.children == "coupled":
            races = logs + gumbel_noise(seed, position, torch.from_numpy(ids)).numpy()
            ids = ids[np.argsort(-races, kind="stable")]
        return tuple(ids[:count].tolist()), None


AnySession: TypeAlias = DraftSession | LookupSession


class Lookup:
    """Opens sessions. Nothing of theirs waits for a turn of the engine: a tree takes less time than the message."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def run(self, job: Job[Result]) -> Result:
        """The job's result."""
        try:
            while True:
                next(job)
        except StopIteration as end:
            return end.value

    @contextmanager
    def session(self, decoding: Decoding) -> Iterator[LookupSession]:
        """A session, as many as there are slots. Raises ResourceExhausted when none is free."""
        with self._executor.engine.cache.slot():
            yield LookupSession(decoding, np.random.default_rng())


def _candidates(trie: Trie, node: int) -> tuple[Int, Float]:
    """The tokens behind a node of the trie, the heaviest first, and the logarithms of their weights."""
    children = list(trie.children[node].items())[:DRAFT_WIDTH]
    ids, nodes = zip(*children, strict=True)
    return np.array(ids, np.int64), np.array([math.log(trie.weights[each]) for each in nodes])


def _stacked(rows: list[DraftDistributions | None]) -> DraftDistributions | None:
    """Rows of several widths as one array, filled up with zeros; None without a row."""
    every = [row for row in rows if row is not None]
    if not every:
        return None
    width = max(row.token_ids.shape[1] for row in every)
    pads = [(0, width - row.token_ids.shape[1]) for row in every]
    token_ids = [np.pad(row.token_ids[0], pad) for row, pad in zip(every, pads, strict=True)]
    weights = [np.pad(row.weights[0], pad) for row, pad in zip(every, pads, strict=True)]
    return DraftDistributions(np.stack(token_ids), np.stack(weights))
