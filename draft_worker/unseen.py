"""A tree grown where the logits are: its shape is known beforehand, and its tokens are read when it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from draft_worker.choosing import NUM_SPARES, Chooser, Level, undrawn
from draft_worker.growth import DEAD, nodes_segment
from draft_worker.mixture import DeviceMixture
from draft_worker.planned import PlannedGrowth
from sequoia.engine.children import DRAFT_WIDTH
from sequoia.engine.executor import Job
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.rankings import coupled_ranking, draft_weights, drawn_ranking, top_ranking
from sequoia.engine.transfer import Array, download, upload
from sequoia.engine.whole_tree import nodes_by_depth
from sequoia.topology import DraftDistributions, Topology


class Ranking(NamedTuple):
    """The tokens that nodes of one depth may have as children, on the device."""

    token_ids: Tensor  # (nodes, width) int64, in the order of the ranks
    num_tokens: Tensor  # (nodes,) int64: how many of them there are; those behind are any
    q: tuple[Tensor, ...] = ()  # for draws: ids (nodes, width) int64 and weights float32


class _Plan(NamedTuple):
    """What the host knows of a tree before it has a token: `nodes` are the planned ones that get children, by depth."""

    nodes: tuple[tuple[int, ...], ...]
    parent_rows: tuple[Tensor, ...]  # of each depth's nodes but the root: which of the nodes above is the parent
    ranks: tuple[Tensor, ...]  # among its children
    exponentials: tuple[Tensor, ...]  # (nodes, DRAFT_WIDTH) float64 by depth; none where nothing is drawn


def grow_unseen(slot: KVSlot, growth: PlannedGrowth, chooser: Chooser, logits: Tensor) -> Job[None]:
    """Grow the whole tree from its root's logits (1, vocabulary): one forward a level, and one copy to the host.

    Where q has fewer tokens than a node has children, what is missing is forwarded like the rest and dropped when the
    tree is read. The tree is the one that `grow_levels` grows.
    """
    shape = growth.shape
    plan = _plan(shape, chooser, logits)
    temperature = chooser.decoding.sampling.temperature
    mixture = DeviceMixture(growth.mixture, temperature, logits.device) if growth.mixture else None
    rankings: list[Ranking] = []
    forwarded: list[int] = []
    for depth, nodes in enumerate(plan.nodes):
        if depth:
            above = rankings[-1].token_ids
            tokens = above[plan.parent_rows[depth - 1], plan.ranks[depth - 1].clamp(max=above.shape[1] - 1)]
            logits = yield nodes_segment(slot, shape, len(growth.committed) - 1, tokens, nodes, forwarded)
            forwarded += nodes
            if mixture:
                mixture.descend(plan.parent_rows[depth - 1], tokens)
        own = logits[:, : chooser.vocab_size]
        rankings.append(_rank(mixture.mixed(own) if mixture else own, growth, chooser, depth, plan))
    for nodes, ranking in zip(plan.nodes, _read(rankings, mixture), strict=True):
        live = dict(zip(growth.planned_frontier, growth.frontier, strict=True))
        rows = [row for row, node in enumerate(nodes) if node in live]
        level = read_level(ranking, rows, growth.child_counts(growth.frontier))
        growth.add(level, [live.get(node, DEAD) for node in nodes])


def _plan(shape: Topology, chooser: Chooser, like: Tensor) -> _Plan:
    nodes = tuple(nodes_by_depth(shape))
    rows = [[above.index(shape.parents[node]) for node in below] for above, below in pairwise(nodes)]
    ranks = [[shape.ranks[node] for node in below] for below in nodes[1:]]
    arrays: list[Array] = [np.array(each, np.int64) for each in (*rows, *ranks)]
    if chooser.decoding.rule.children == "drawn":
        arrays += [chooser.generator.standard_exponential((len(each), DRAFT_WIDTH)) for each in nodes]
    uploaded = upload(arrays, like.device)
    below = len(rows)
    return _Plan(nodes, tuple(uploaded[:below]), tuple(uploaded[below : 2 * below]), tuple(uploaded[2 * below :]))


def _rank(logits: Tensor, growth: PlannedGrowth, chooser: Chooser, depth: int, plan: _Plan) -> Ranking:
    """What `choose_level` chooses from, for nodes of one depth with these logits (nodes, vocabulary)."""
    kind, sampling = chooser.decoding.rule.children, chooser.decoding.sampling
    count = NUM_SPARES + max(len(growth.shape.children[node]) for node in plan.nodes[depth])
    if kind == "drawn":
        q = draft_weights(logits, sampling)
        return Ranking(*drawn_ranking(*q, plan.exponentials[depth]), q)
    if kind == "coupled":
        token_ids, num_tokens = coupled_ranking(logits, sampling, len(growth.committed) + depth)
        return Ranking(token_ids[:, :count], num_tokens)
    return Ranking(*top_ranking(logits, count))


class ReadRanking(NamedTuple):
    """A `Ranking` on the host."""

    token_ids: Array
    num_tokens: Array
    q: tuple[Array, ...]


def _read(rankings: Sequence[Ranking], mixture: DeviceMixture | None) -> list[ReadRanking]:
    """All of them in one copy, and what the mixture learns."""
    tensors = [tensor for each in rankings for tensor in (each.token_ids, each.num_tokens, *each.q)]
    arrays = iter(download([*tensors, mixture.root_shares] if mixture else tensors))
    if mixture:
        *others, root_shares = arrays
        mixture.read(root_shares)
        arrays = iter(others)
    return [ReadRanking(next(arrays), next(arrays), tuple(next(arrays) for _ in each.q)) for each in rankings]


def read_level(ranking: ReadRanking, rows: Sequence[int], counts: Sequence[int]) -> Level:
    """The children of the nodes in some rows, `counts[i]` of them or as many as there are, as `choose_level` has it."""
    ranked = [tuple(ranking.token_ids[row, : ranking.num_tokens[row]].tolist()) for row in rows]
    children = tuple(tokens[:count] for tokens, count in zip(ranked, counts, strict=True))
    if not ranking.q:
        behind = (tokens[count : count + NUM_SPARES] for tokens, count in zip(ranked, counts, strict=True))
        return Level(children, tuple(behind))
    token_ids, weights = (each[list(rows)] for each in ranking.q)
    # What q does not use lies behind what it uses, and holds any ids.
    is_used = weights > 0.0
    width = max(1, int(is_used.sum(axis=1).max(initial=0)))
    q = DraftDistributions(np.where(is_used, token_ids, 0).astype(np.uint32)[:, :width], weights[:, :width])
    return Level(children, tuple(undrawn(q, row, tokens) for row, tokens in enumerate(children)), q)
