"""Verification: which path of a tree the target accepts, and the bonus token after it.

Three ways to verify serve all rules: a walk along the target's own tokens (greedy, coupled, sample_and_walk),
recursive rejection from the root down (sequoia), and traversal from the leaves up. Each leaves the target's
distribution exactly as it is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sequoia.engine.sampling import (
    Choices,
    Path,
    adjusted_logits,
    argmax,
    coupled_token,
    log_weights,
    target_distribution,
)
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL
from sequoia.sampling import Decoding
from sequoia.topology import TokenLogprobs, TokenTree, Verdict

TargetP = Callable[[int], Tensor]  # node -> p after it, (vocabulary,) float64


class TargetRows:
    """What the target makes of every node of a tree, each along its own path; computed for the nodes asked for."""

    def __init__(self, tree: TokenTree, logits: Tensor, decoding: Decoding, committed: tuple[int, ...]) -> None:
        self._tree, self._logits, self._decoding = tree, logits, decoding  # logits: (size, vocabulary)
        self._committed = committed

    def p(self, node: int) -> Tensor:
        """The distribution after `node`, (vocabulary,) float64."""
        return target_distribution(self._adjusted(node), self._decoding.sampling)

    def argmax(self, node: int) -> int:
        """The likeliest token after `node`."""
        # Without a copy in float64 where nothing is adjusted: the same order, the same ties.
        is_adjusted = self._decoding.sampling.adjusts(self._path(node).num_generated)
        return argmax(self._adjusted(node) if is_adjusted else self._logits[node])

    def coupled_token(self, node: int) -> int:
        """The token after `node` that the seed's noise picks."""
        return coupled_token(self._adjusted(node), self._decoding.sampling, self._path(node).position)

    def logprobs(self, node: int, token_id: int, count: int) -> TokenLogprobs:
        """Of `token_id` after `node`, and of the `count` likeliest tokens by the model itself.

        Raw: of the model's logits as they are. Processed: of p; at temperature 0, of the adjusted logits.
        """
        sampling, adjusted = self._decoding.sampling, self._adjusted(node)
        weights = adjusted if sampling.greedy else log_weights(adjusted, sampling)
        raw, processed = self._logits[node].double().log_softmax(0), weights.log_softmax(0)
        ids = torch.cat([torch.tensor([token_id], device=raw.device), raw.topk(min(count, len(raw))).indices])
        (_, own_raw, own), *top = zip(ids.tolist(), raw[ids].tolist(), processed[ids].tolist(), strict=True)
        return TokenLogprobs(token_id, own_raw, own, tuple(top))

    def _path(self, node: int) -> Path:
        return Path(self._committed, self._decoding.num_prompt_tokens, self._tree.path_tokens(node))

    def _adjusted(self, node: int) -> Tensor:
        return adjusted_logits(self._logits[node], self._decoding.sampling, self._path(node))


def verify_tree(
    tree: TokenTree, logits: Tensor, decoding: Decoding, committed: tuple[int, ...], choices: Choices
) -> Verdict:
    """The verdict on a tree whose nodes have the target's logits (size, vocabulary).

    `committed` are all committed tokens; the last is the tree's root. Raises Internal when the logits are broken.
    """
    rows, rule = TargetRows(tree, logits, decoding, committed), decoding.rule
    if rule is GREEDY:
        verdict = walk(tree, rows.argmax)
    elif rule is COUPLED:
        verdict = walk(tree, rows.coupled_token)
    elif rule is SAMPLE_AND_WALK:
        verdict = walk(tree, lambda node: choices.draw(rows.p(node)))
    elif rule is SEQUOIA:
        verdict = reject_recursively(tree, rows.p, choices)
    else:
        assert rule is TRAVERSAL, rule
        verdict = traverse(tree, rows.p, choices)
    if decoding.sampling.num_logprobs is None:
        return verdict
    parents, tokens = (0, *verdict.accepted_nodes), verdict.tokens(tree)
    count = decoding.sampling.num_logprobs
    logprobs = (rows.logprobs(node, token, count) for node, token in zip(parents, tokens, strict=True))
    return Verdict(verdict.accepted_nodes, verdict.bonus_token_id, tuple(logprobs))


def walk(tree: TokenTree, target_token: Callable[[int], int]) -> Verdict:
    """Follow the child that carries the target's own token; a token that is no child is the bonus token.

    The tokens are the target's whatever the children are, so any source of children is exact.
    """
    path: list[int] = []
    node = 0
    while True:
        token = target_token(node)
        matching = (child for child in tree.topology.children[node] if tree.token_ids[child] == token)
        if (child := next(matching, None)) is None:
            return Verdict(tuple(path), token)
        path.append(node := child)


def reject_recursively(
    tree: TokenTree, target_p: TargetP, choices: Choices, *, with_replacement: bool = False
) -> Verdict:
    """Sequoia's rule: children drawn without replacement (Chen et al. 2024, arXiv 2402.12374, algorithm 2).

    Per node R = p, D = q; for each child s in draw order: accept with probability min(1, R[s] / D[s]); else
    R = norm(max(R - D, 0)), D[s] = 0, D = norm(D). After the last rejection the bonus token is drawn from R.
    `with_replacement` leaves D as it is: SpecInfer's rule (Miao et al. 2023, arXiv 2305.09781), for independent draws.
    """
    path: list[int] = []
    node = 0
    while True:
        siblings = _Siblings(tree, node, target_p(node))
        for child in siblings:
            if choices.accept(siblings.target(child), siblings.draft(child)) or not siblings.reject(1.0):
                path.append(node := child)
                break
            if not with_replacement:
                siblings.remove(child)
        else:
            return Verdict(tuple(path), siblings.draw(choices))


def traverse(tree: TokenTree, target_p: TargetP, choices: Choices) -> Verdict:
    """Traversal verification of a tree drawn as for `reject_recursively` (Weng et al. 2025, arXiv 2505.12398).

    From the leaves up: a node stands with weight w (the root's is 1), R = p, D = q. Each child c in draw order is tried
    with weight min(1, w R[c] / D[c]), its own children first. When it fails, X = max(w R - D, 0), z = sum X,
    w = z / (z + 1 - w), R = X / z, D[c] = 0, D = norm(D). When no child is left the node succeeds with probability w:
    the path to it is accepted, and the bonus token is drawn from R.
    """
    visits = [_Siblings(tree, 0, target_p(0))]
    weights, remaining = [1.0], [iter(visits[0])]
    path: list[int] = []
    while True:
        siblings = visits[-1]
        child = next(remaining[-1], None)
        if child is not None:
            weight = min(1.0, weights[-1] * siblings.target(child) / siblings.draft(child))
            if weight > 0.0:
                path.append(child)
                weights.append(weight)
                visits.append(_Siblings(tree, child, target_p(child)))
                remaining.append(iter(visits[-1]))
                continue
        elif choices.accept(weights[-1], 1.0):
            return Verdict(tuple(path), siblings.draw(choices))
        else:
            for stack in (visits, weights, remaining):
                stack.pop()
            child = path.pop()
        left = visits[-1].reject(weights[-1])
        # By the formula 1 stays 1; the root, whose weight it is, must not fail by rounding.
        weights[-1] = left if weights[-1] < 1.0 else 1.0
        visits[-1].remove(child)


class _Siblings:
    """The children of a node under rejection: R, which begins as p, and D, which begins as q.

    R is kept as its values at q's candidates and, elsewhere, as a multiple of p: a rejection then costs q's width and
    not the vocabulary's.
    """

    def __init__(self, tree: TokenTree, node: int, p: Tensor) -> None:
        self._tree, self._children, self._p = tree, tree.topology.children[node], p
        candidates, self._draft = _q(tree, node) if self._children else (np.empty(0, np.int64), np.empty(0))
        self._ids = torch.from_numpy(candidates).to(p.device)
        self._columns = {int(token): column for column, token in enumerate(candidates)}
        self._values: NDArray[np.float64] = p[self._ids].cpu().numpy()
        self._scale = 1.0
        self._outside = float(p.index_fill(0, self._ids, 0.0).sum()) if self._children else 1.0

    def __iter__(self) -> Iterator[int]:
        return iter(self._children)

    def target(self, child: int) -> float:
        """R at the child's token."""
        return float(self._values[self._column(child)])

    def draft(self, child: int) -> float:
        """D at the child's token: above 0, because it was drawn from D."""
        return float(self._draft[self._column(child)])

    def reject(self, weight: float) -> float:
        """R = norm(max(weight R - D, 0)); returns the new weight z / (z + 1 - weight), where z is the mass before norm.

        0 when weight R and D are equal up to rounding, so that nothing is left to draw from: R then stays as it is.
        """
        values = np.maximum(weight * self._values - self._draft, 0.0)
        mass = float(values.sum()) + weight * self._scale * self._outside
        if mass < sys.float_info.min:
            return 0.0
        self._values, self._scale = values / mass, weight * self._scale / mass
        return mass / (mass + (1.0 - weight))

    def remove(self, child: int) -> None:
        """Take the child's token out of D: the next one was drawn from what is left."""
        self._draft[self._column(child)] = 0.0
        if (mass := self._draft.sum()) > 0.0:
            self._draft /= mass

    def draw(self, choices: Choices) -> int:
        """The bonus token, from R."""
        weights = self._p * self._scale
        weights[self._ids] = torch.from_numpy(self._values).to(weights.device)
        return choices.draw(weights)

    def _column(self, child: int) -> int:
        return self._columns[self._tree.token_ids[child]]


def _q(tree: TokenTree, node: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The candidates of the q that a node's children were drawn from, and their probabilities."""
    assert tree.q is not None, "the rule needs q"
    row = tree.topology.internal_nodes.index(node)
    support = tree.q.weights[row] > 0
    weights = tree.q.weights[row][support].astype(np.float64)
    return tree.q.token_ids[row][support].astype(np.int64), weights / math.fsum(weights)
