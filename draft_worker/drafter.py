"""The drafter: keeps a session's KV in step with the committed tokens and grows token trees, level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.attention import Segment, chunk_segment
from sequoia.engine.executor import Executor, Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.sampling import (
    Path,
    adjusted_logits,
    coupled_children,
    draft_distributions,
    draw_children,
    top_children,
)
from sequoia.errors import InvalidArgument
from sequoia.sampling import Decoding
from sequoia.topology import DraftDistributions, TokenTree, Topology
from sequoia.worker import feed


@dataclass(frozen=True)
class Level:
    """The children chosen under some nodes of one depth, and the q they were drawn from, if the rule needs it."""

    children: tuple[tuple[int, ...], ...]  # tokens, one tuple a node
    q: DraftDistributions | None = None  # one row a node


def choose_level(
    logits: Tensor, decoding: Decoding, paths: Sequence[Path], counts: Sequence[int], generator: np.random.Generator
) -> Level:
    """The children of nodes of one depth by the rule: `counts[i]` of them, or fewer where q has fewer.

    `logits` are the draft's (nodes, vocabulary); `paths` end with the nodes' own tokens.
    """
    sampling = decoding.sampling
    if sampling.adjusts(paths[0].num_generated):
        rows = zip(logits, paths, strict=True)
        logits = torch.stack([adjusted_logits(row, sampling, path) for row, path in rows])
    if decoding.rule.children == "top":
        return Level(tuple(top_children(row, count) for row, count in zip(logits, counts, strict=True)))
    if decoding.rule.children == "coupled":
        return Level(coupled_children(logits, sampling, paths[0].position, counts))
    q = draft_distributions(logits, sampling)
    return Level(tuple(draw_children(q, row, count, generator) for row, count in enumerate(counts)), q)


@dataclass(frozen=True)
class GrownTree:
    """A tree, the committed length it was grown at, and the forwarded nodes in the order of their KV rows."""

    tree: TokenTree
    num_committed: int
    forwarded: tuple[int, ...]

    def rows_for(self, tokens: tuple[int, ...]) -> list[int]:
        """KV rows, counted behind the committed ones, that hold a beginning of `tokens`."""
        path = self.tree.follow(tokens)
        return [self.forwarded.index(node) for node in path if node in self.forwarded]


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """What all sessions of a draft model share."""

    prefill_chunk: int  # most prompt tokens in a forward
    vocab_size: int  # tokens the tokenizer knows: padding of the draft's logits may lie outside the target's


class DraftSession:
    """One session of the drafter. Its KV follows from the committed tokens alone.

    Every committed token without a row (an accepted leaf, tokens of plain steps, the bonus token) rides along in the
    next root forward. Leaves are never forwarded, so a tree of d levels costs d - 1 forwards.
    """

    def __init__(self, slot: KVSlot, decoding: Decoding, generator: np.random.Generator, limits: DraftLimits) -> None:
        self._slot, self._decoding, self._generator, self._limits = slot, decoding, generator, limits
        self._committed: tuple[int, ...] = ()
        self._last: GrownTree | None = None

    @property
    def num_committed(self) -> int:
        """Committed tokens known, in tokens."""
        return len(self._committed)

    def commit(self, base_len: int, token_ids: tuple[int, ...]) -> None:
        """Take `token_ids` as the committed tokens from `base_len` on. Raises InvalidArgument when they contradict."""
        known = self._committed[base_len:]
        if base_len > self.num_committed or token_ids[: len(known)] != known:
            raise InvalidArgument(f"does not continue the {self.num_committed} committed tokens", "base_len")
        self._committed = self._committed[:base_len] + token_ids

    def prefill(self) -> Job[None]:
        """Make rows for all committed tokens but the root."""
        yield from feed(self._slot, self._committed[self._slot.length : -1], self._limits.prefill_chunk)

    def grow(self, topology: Topology) -> Job[TokenTree]:
        """The tree of that topology, smaller where a q had fewer tokens than a node has children."""
        self._keep_accepted()
        chunk = self._limits.prefill_chunk
        pending = self._committed[self._slot.length :]
        num_fed = (len(pending) - 1) // chunk * chunk
        yield from feed(self._slot, pending[:num_fed], chunk)
        root = pending[num_fed:]  # and what rides along
        logits = yield chunk_segment(self._slot, root, logits=True)
        self._slot.keep(range(len(root)))
        growth = Growth(topology, self._committed[-1])
        while True:
            level = self._choose(growth, logits)
            growth.add(level)
            if not growth.frontier:
                break
            logits = yield growth.segment(self._slot)
        self._last = growth.finish(self.num_committed)
        return self._last.tree

    def _keep_accepted(self) -> None:
        """Keep the last tree's rows that have become committed tokens; the root is always forwarded anew."""
        if self._last is not None:
            self._slot.keep(self._last.rows_for(self._committed[self._last.num_committed :]))
            self._last = None
        self._slot.truncate(min(self._slot.length, self.num_committed - 1))

    def _choose(self, growth: Growth, logits: Tensor) -> Level:
        prompt = self._decoding.num_prompt_tokens
        paths = [Path(self._committed, prompt, drafted) for drafted in growth.frontier_paths]
        rows = logits[:, : self._limits.vocab_size]
        return choose_level(rows, self._decoding, paths, growth.child_counts, self._generator)


class Growth:
    """A tree being grown over a planned topology. Nodes are numbered as they get their tokens, in level order."""

    def __init__(self, topology: Topology, root_token: int) -> None:
        self._planned = topology
        self._parents, self._tokens = [-1], [root_token]
        self._planned_nodes = [0]  # the planned node behind each grown one
        self._forwarded: list[int] = []
        self._q_rows: list[tuple[np.ndarray, np.ndarray]] = []
        self.frontier = [0] if topology.size > 1 else []

    @property
    def frontier_paths(self) -> list[tuple[int, ...]]:
        """The tokens from the root, left out, to each node of the frontier."""
        tree = TokenTree(Topology(tuple(self._parents)), tuple(self._tokens))
        return [tree.path_tokens(node) for node in self.frontier]

    @property
    def child_counts(self) -> list[int]:
        """Children wanted under each node of the frontier."""
        return [len(self._planned_children(node)) for node in self.frontier]

    def add(self, level: Level) -> None:
        """Give the frontier's nodes their children; the next frontier is those that shall have children themselves."""
        grown: list[int] = []
        for index, (node, tokens) in enumerate(zip(self.frontier, level.children, strict=True)):
            for planned, token in zip(self._planned_children(node), tokens, strict=False):
                grown.append(len(self._tokens))
                self._parents.append(node)
                self._tokens.append(token)
                self._planned_nodes.append(planned)
            if tokens and level.q is not None:
                self._q_rows.append((level.q.token_ids[index], level.q.weights[index]))
        self.frontier = [node for node in grown if self._planned_children(node)]

    def segment(self, slot: KVSlot) -> Segment:
        """The forward of the frontier, behind the rows of the levels before it."""
        shape = Topology(tuple(self._parents))
        first_row = slot.length + len(self._forwarded)
        self._forwarded.extend(self.frontier)
        visible = shape.ancestor_mask[np.ix_(self.frontier, self._forwarded)]
        depths = np.array(shape.depths)
        root_position = slot.length - 1
        return Segment(
            slot,
            tuple(self._tokens[node] for node in self.frontier),
            root_position + depths[self.frontier],
            slot.length,
            first_row,
            visible,
            root_position + depths[self._forwarded],
            tuple(range(len(self.frontier))),
        )

    def finish(self, num_committed: int) -> GrownTree:
        """The grown tree with the q rows of the nodes that have children."""
        q = None
        if self._q_rows:
            token_ids, weights = zip(*self._q_rows, strict=True)
            q = DraftDistributions(np.stack(token_ids), np.stack(weights))
        tree = TokenTree(Topology(tuple(self._parents)), tuple(self._tokens), q)
        return GrownTree(tree, num_committed, tuple(self._forwarded))

    def _planned_children(self, node: int) -> tuple[int, ...]:
        return self._planned.children[self._planned_nodes[node]]


class Drafter:
    """Opens sessions on one draft model."""

    def __init__(self, executor: Executor, limits: DraftLimits) -> None:
        self.executor = executor
        self._limits = limits

    @contextmanager
    def session(self, decoding: Decoding) -> Iterator[DraftSession]:
        """A session with a KV slot of its own. Raises ResourceExhausted when none is free."""
        with self.executor.engine.cache.slot() as slot:
            yield DraftSession(slot, decoding, np.random.default_rng(), self._limits)
