"""Verification: which path of a tree the target accepts, and the bonus token after it.

Three ways to verify serve all rules: a walk along the target's own tokens (greedy, coupled, sample_and_walk),
recursive rejection from the root down (sequoia), and traversal from the leaves up. Each leaves the target's
distribution exactly as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from sequoia.engine.logprobs import token_logprobs
from sequoia.engine.sampling import (
    Choices,
    Path,
    adjusted_logits,
    argmax,
    coupled_token,
    log_weights,
    target_distribution,
)
from sequoia.engine.siblings import Siblings, Target, WholeTarget
from sequoia.engine.tree_logits import Logits
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding
from sequoia.topology import TokenLogprobs, TokenTree, Verdict

Targets = Callable[[int], Target]  # node -> p after it


class TreeTarget(Protocol):
    """What the target makes of every node of a tree, each along its own path."""

    def token(self, node: int) -> int:
        """The target's own token after `node`, for a rule that walks along it."""
        ...

    def target(self, node: int) -> Target:
        """p after `node`, for a rule that rejects."""
        ...

    def logprobs(self, nodes: Sequence[int], token_ids: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
        """Of a token after each node; at temperature 0 what is processed are the adjusted logits."""
        ...


# From a tree, its logits (size, vocabulary), the decoding, all committed tokens (the last is the root), and choices.
MakeTarget = Callable[[TokenTree, Logits, Decoding, tuple[int, ...], Choices], TreeTarget]


class TargetRows:
    """A `TreeTarget` that is computed for the nodes asked for."""

    def __init__(
        self, tree: TokenTree, logits: Logits, decoding: Decoding, committed: tuple[int, ...], choices: Choices
    ) -> None:
        self._tree, self._logits, self._decoding = tree, logits, decoding  # logits: (size, vocabulary)
        self._committed, self._choices = committed, choices

    def token(self, node: int) -> int:
        """The target's own token after `node`, for a rule that walks along it."""
        rule, sampling = self._decoding.rule, self._decoding.sampling
        if rule is GREEDY:
            # Without a copy in float64 where nothing is adjusted: the same order, the same ties.
            is_adjusted = sampling.adjusts(self._path(node).num_generated)
            return argmax(self._adjusted(node) if is_adjusted else self._logits[node])
        if rule is COUPLED:
            return coupled_token(self._adjusted(node), sampling, self._path(node).position)
        assert rule is SAMPLE_AND_WALK, rule
        return self._choices.draw(self._p(node))

    def target(self, node: int) -> Target:
        """p after `node`, for a rule that rejects."""
        return WholeTarget(self._p(node))

    def logprobs(self, nodes: Sequence[int], token_ids: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
        """Of a token after each node; at temperature 0 what is processed are the adjusted logits."""
        sampling, adjusted = self._decoding.sampling, [self._adjusted(node) for node in nodes]
        weights = adjusted if sampling.greedy else [log_weights(row, sampling) for row in adjusted]
        return token_logprobs(self._logits[list(nodes)], torch.stack(weights), token_ids, count)

    def _p(self, node: int) -> Tensor:
        return target_distribution(self._adjusted(node), self._decoding.sampling)

    def _path(self, node: int) -> Path:
        return Path(self._committed, self._decoding.num_prompt_tokens, self._tree.path_tokens(node))

    def _adjusted(self, node: int) -> Tensor:
        decoding = self._decoding
        return adjusted_logits(self._logits[node], decoding.sampling, self._path(node), decoding.constraint)


def verify_tree(
    tree: TokenTree,
    logits: Logits,
    decoding: Decoding,
    committed: tuple[int, ...],
    choices: Choices,
    make_target: MakeTarget = TargetRows,
) -> Verdict:
    """The verdict on a tree whose nodes have the target's logits (size, vocabulary).

    `committed` are all committed tokens; the last is the tree's root. Raises Internal when the logits are broken.
    """
    target = make_target(tree, logits, decoding, committed, choices)
    verdict = _verdict(tree, target, decoding.rule, choices)
    if (count := decoding.sampling.num_logprobs) is None:
        return verdict
    logprobs = target.logprobs((0, *verdict.accepted_nodes), verdict.tokens(tree), count)
    return replace(verdict, logprobs=logprobs)


def _verdict(tree: TokenTree, rows: TreeTarget, rule: Rule, choices: Choices) -> Verdict:
    if rule is SEQUOIA:
        return reject_recursively(tree, rows.target, choices)
    if rule is TRAVERSAL:
        return traverse(tree, rows.target, choices)
    return walk(tree, rows.token)


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
    tree: TokenTree, targets: Targets, choices: Choices, *, with_replacement: bool = False
) -> Verdict:
    """Sequoia's rule: children drawn without replacement (Chen et al. 2024, arXiv 2402.12374, algorithm 2).

    Per node R = p, D = q; for each child s in draw order: accept with probability min(1, R[s] / D[s]); else
    R = norm(max(R - D, 0)), D[s] = 0, D = norm(D). After the last rejection the bonus token is drawn from R.
    `with_replacement` leaves D as it is: SpecInfer's rule (Miao et al. 2023, arXiv 2305.09781), for independent draws.
    """
    path: list[int] = []
    node = 0
    while True:
        siblings = Siblings(tree, node, targets(node))
        for child in siblings:
            if choices.accept(siblings.target(child), siblings.draft(child)) or not siblings.reject(1.0):
                path.append(node := child)
                break
            if not with_replacement:
                siblings.remove(child)
        else:
            return Verdict(tuple(path), siblings.draw(choices))


def traverse(tree: TokenTree, targets: Targets, choices: Choices) -> Verdict:
    """Traversal verification of a tree drawn as for `reject_recursively` (Weng et al. 2025, arXiv 2505.12398).

    From the leaves up: a node stands with weight w (the root's is 1), R = p, D = q. Each child c in draw order is tried
    with weight min(1, w R[c] / D[c]), its own children first. When it fails, X = max(w R - D, 0), z = sum X,
    w = z / (z + 1 - w), R = X / z, D[c] = 0, D = norm(D). When no child is left the node succeeds with probability w:
    the path to it is accepted, and the bonus token is drawn from R.
    """
    visits = [Siblings(tree, 0, targets(0))]
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
                visits.append(Siblings(tree, child, targets(child)))
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
