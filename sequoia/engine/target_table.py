"""What the target makes of a whole tree, computed where its logits are and read in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.logprobs import token_logprobs
from sequoia.engine.noise import DRAW_FROM_OTHERS, OTHERS, gumbel_rows, streams, uniform_rows
from sequoia.engine.sampling import COUPLED_WIDTH, Choices, Path, adjusted_logits, finite_peak
from sequoia.engine.siblings import Ids, Reals
from sequoia.engine.transfer import download, upload
from sequoia.engine.tree_logits import Logits
from sequoia.rules import COUPLED
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import DraftDistributions, TokenLogprobs, TokenTree


@dataclass(frozen=True, slots=True)
class ReadTarget:
    """p after a node in few numbers: its values at q's candidates, the mass outside them, one token drawn from there.

    A residual is a multiple of p outside the candidates. So the bonus token is drawn in two stages: a candidate or
    "outside" by their masses, and then, outside, from p restricted to that. The second stage does not depend on how
    the first came out, nor on any other choice: it may be drawn before them, and serves at most once.
    """

    values: Reals  # (candidates,)
    outside: float
    token_id: int

    def at(self, ids: Ids) -> tuple[Reals, float]:
        """As `siblings.Target` has it."""
        assert len(ids) == len(self.values)
        return self.values, self.outside

    def draw(self, ids: Ids, values: Reals, scale: float, choices: Choices) -> int:
        """As `siblings.Target` has it."""
        index = choices.draw(torch.from_numpy(np.append(values, scale * self.outside)))
        return int(ids[index]) if index < len(ids) else self.token_id


class TargetTable:
    """A `verification.TreeTarget` of all nodes at once, read in one copy from any device."""

    def __init__(
        self, tree: TokenTree, logits: Logits, decoding: Decoding, committed: tuple[int, ...], choices: Choices
    ) -> None:
        assert isinstance(logits, Tensor), "an engine that reads once makes all logits at once"
        self._tree, self._logits, self._decoding = tree, logits, decoding
        adjusted = _adjusted(tree, logits, decoding, committed)
        sampling = decoding.sampling
        self._weights = adjusted if sampling.greedy else log_weights_of_rows(adjusted, sampling)
        read = [adjusted.amax(1).double()]
        if decoding.rule.needs_q and tree.q is not None:
            nodes, ids = upload(_candidate_columns(tree, tree.q), logits.device)
            restricted, values, outside = restrict(self._weights, nodes, ids)
            read += [choices.race(restricted), values, outside]
        elif sampling.greedy:
            read += [adjusted.argmax(1)]
        elif decoding.rule is COUPLED:
            read += [_coupled_tokens(self._weights, tree, sampling, len(committed))]
        else:
            read += [choices.race(self._weights)]
        self._peaks, self._tokens, *self._candidates = download(read)

    def token(self, node: int) -> int:
        """The target's own token after `node`, for a rule that walks along it. Raises Internal on broken logits."""
        finite_peak(float(self._peaks[node]))
        return int(self._tokens[node])

    def target(self, node: int) -> ReadTarget:
        """p after `node`, for a rule that rejects. Raises Internal on broken logits."""
        token_id = self.token(node)
        if not self._tree.topology.children[node]:
            return ReadTarget(np.empty(0), 1.0, token_id)
        assert self._tree.q is not None
        row = self._tree.topology.internal_nodes.index(node)
        values, outside = self._candidates
        return ReadTarget(values[row][self._tree.q.weights[row] > 0], float(outside[row]), token_id)

    def logprobs(self, nodes: Sequence[int], token_ids: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
        """Of a token after each node: reads once more."""
        [rows] = upload((np.array(nodes),), self._logits.device)
        return token_logprobs(self._logits.index_select(0, rows), self._weights.index_select(0, rows), token_ids, count)


def restrict(weights: Tensor, nodes: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide p of some nodes, whose logarithms are among weights (size, vocabulary), into candidates and all others.

    `nodes`: (rows,), `ids`: (rows, width) their candidates. Returns the weights without the nodes' candidates, and of
    those nodes p at the candidates, (rows, width), and the mass of all others, (rows,).
    """
    own = weights.index_select(0, nodes)
    p = own.softmax(1)
    restricted = weights.index_copy(0, nodes, own.scatter(1, ids, -math.inf))
    return restricted, p.gather(1, ids), p.scatter(1, ids, 0.0).sum(1)


def log_weights_of_rows(adjusted: Tensor, sampling: Sampling) -> Tensor:
    """`sampling.log_weights` of many rows (rows, vocabulary), without a look at any of them; NaN stays NaN."""
    scaled = (adjusted - adjusted.amax(1, keepdim=True)) / sampling.temperature
    if sampling.min_p > 0.0:
        scaled = scaled.masked_fill(scaled < math.log(sampling.min_p), -math.inf)
    if 0 < sampling.top_k < scaled.shape[1]:
        threshold = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(~_largest(scaled, threshold, sampling.top_k), -math.inf)
    if sampling.top_p < 1.0:
        p = scaled.softmax(1)
        descending = p.sort(1, descending=True).values
        count = (descending.cumsum(1) < sampling.top_p).sum(1, keepdim=True).add(1).clamp(max=p.shape[1])
        scaled = scaled.masked_fill(~_largest(p, descending.gather(1, count - 1), count), -math.inf)
    return scaled


def _largest(values: Tensor, threshold: Tensor, count: Tensor | int) -> Tensor:
    """Mask of each row's `count` largest, down to its threshold (rows, 1); ties there by smaller id."""
    above, ties = values > threshold, values == threshold
    return above | (ties & (ties.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _adjusted(tree: TokenTree, logits: Tensor, decoding: Decoding, committed: tuple[int, ...]) -> Tensor:
    """(size, vocabulary); float64, or as they are where the argmax of what the model says is all that is asked."""
    sampling, held, num_prompt_tokens = decoding.sampling, decoding.constraint, decoding.num_prompt_tokens
    if not sampling.adjusts(len(committed) - num_prompt_tokens):
        return logits if sampling.greedy else logits.double()
    paths = (Path(committed, num_prompt_tokens, tree.path_tokens(node)) for node in range(tree.topology.size))
    return torch.stack([adjusted_logits(row, sampling, path, held) for row, path in zip(logits, paths, strict=True)])


def _candidate_columns(tree: TokenTree, q: DraftDistributions) -> tuple[Ids, Ids]:
    """The internal nodes, and the candidates of each, a column that is not used holding the first one's token."""
    used = q.weights > 0
    first = q.token_ids[np.arange(len(used)), used.argmax(axis=1)][:, None]
    ids = np.where(used, q.token_ids, first).astype(np.int64)
    return np.array(tree.topology.internal_nodes), ids


def _coupled_tokens(weights: Tensor, tree: TokenTree, sampling: Sampling, position: int) -> Tensor:
    """`sampling.coupled_token` after every node, (size,); the nodes of one depth share the noise."""
    assert sampling.seed is not None, "the coupled rule needs a seed"
    nodes = streams(sampling.seed, (position + depth for depth in tree.topology.depths))
    keys, own = upload((nodes[:, None], np.array([OTHERS, DRAW_FROM_OTHERS])), weights.device)
    return coupled_tokens(weights, keys, own)


def coupled_tokens(weights: Tensor, keys: Tensor, own: Tensor, width: int = COUPLED_WIDTH) -> Tensor:
    """For rows of log p (rows, vocabulary), 0 at the largest, with `streams` (rows, 1): a token each, (rows,).

    `own` are the ids OTHERS and DRAW_FROM_OTHERS.
    """
    width = min(width, weights.shape[1])
    is_likely = _largest(weights, weights.topk(width).values[:, -1:], width)
    ids = weights.masked_fill(~is_likely, -math.inf).topk(width).indices
    best = (gumbel_rows(keys, ids) + weights.gather(1, ids)).max(1, keepdim=True)
    others = weights.exp().scatter(1, ids, 0.0)
    race = others.sum(1, keepdim=True).log() + gumbel_rows(keys, own[:1])
    drawn = _inverted(others, uniform_rows(keys, own[1:]))
    return torch.where(race > best.values, drawn, ids.gather(1, best.indices))[:, 0]


def _inverted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """For each row (rows, n) the index where the running sum exceeds that share (rows, 1) of the total, (rows, 1).

    A parallel sum may be uneven by rounding: where it points at a weight of 0, the last one before it that has some.
    """
    cumulative, last = weights.cumsum(1), weights.shape[1] - 1
    index = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp(max=last)
    ids = torch.arange(last + 1, device=weights.device).expand_as(weights)
    return torch.where(weights > 0.0, ids, 0).cummax(1).values.gather(1, index)
