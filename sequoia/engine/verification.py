"""Verification: which path of a tree the target accepts, and the bonus token after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sequoia.engine.sampling import Choices, Sampling, argmax, target_distribution
from sequoia.topology import TokenTree, Verdict


def verify_tree(tree: TokenTree, logits: Tensor, sampling: Sampling, choices: Choices) -> Verdict:
    """The verdict on a tree whose nodes have the target's logits (size, vocabulary)."""
    if sampling.greedy:
        return verify_greedy(tree, lambda node: argmax(logits[node]))
    return verify_sequoia(tree, lambda node: target_distribution(logits[node], sampling), choices)


def verify_greedy(tree: TokenTree, target_token: Callable[[int], int]) -> Verdict:
    """T = 0: follow the child that carries the target's argmax; an argmax that is no child is the bonus token."""
    path: list[int] = []
    node = 0
    while True:
        token = target_token(node)
        matching = (child for child in tree.topology.children[node] if tree.token_ids[child] == token)
        if (child := next(matching, None)) is None:
            return Verdict(tuple(path), token)
        path.append(node := child)


def verify_sequoia(tree: TokenTree, target_p: Callable[[int], Tensor], choices: Choices) -> Verdict:
    """Recursive rejection over children drawn without replacement (Chen et al. 2024, arXiv 2402.12374, algorithm 2).

    `target_p(node)` is p after that node: (vocabulary,) float64. Per node R = p, D = q; for each child s in draw order:
    accept with probability min(1, R[s] / D[s]); else R = norm(max(R - D, 0)), D[s] = 0, D = norm(D). After the last
    rejection the bonus token is drawn from R. The output follows the target's distribution exactly.
    """
    path: list[int] = []
    node = 0
    while True:
        accepted, residual = _choose_child(tree, node, target_p(node), choices)
        if accepted is None:
            return Verdict(tuple(path), choices.draw(residual))
        path.append(node := accepted)


def _choose_child(tree: TokenTree, node: int, residual: Tensor, choices: Choices) -> tuple[int | None, Tensor]:
    """The accepted child, or None, and the residual R after the rejections before it."""
    children = tree.topology.children[node]
    if not children:
        return None, residual
    assert tree.q is not None, "the sequoia rule needs q"
    row = tree.topology.internal_nodes.index(node)
    support = tree.q.weights[row] > 0
    candidates = torch.from_numpy(tree.q.token_ids[row][support].astype("int64")).to(residual.device)
    draft = torch.from_numpy(tree.q.weights[row][support].astype("float64")).to(residual.device)
    for child in children:
        token = tree.token_ids[child]
        draft = draft / draft.sum()
        column = candidates == token
        if choices.accept(float(residual[token]), float(draft[column].sum())):
            return child, residual
        rejected = residual.clone()
        rejected[candidates] = (residual[candidates] - draft).clamp_(min=0.0)
        mass = rejected.sum()
        if float(mass) <= 0.0:
            # R and D are equal up to rounding: the child is accepted with probability 1.
            return child, residual
        residual = rejected / mass
        draft = draft.masked_fill(column, 0.0)
    return None, residual
