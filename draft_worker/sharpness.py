"""How sharply a draft's logits tell what the target will choose: learnt from what it has chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from draft_worker.choosing import Tokens
from draft_worker.dynamic import DynamicGrowth
from sequoia.sampling import Decoding

# Before anything is learnt: q itself; and what a coupled race was once measured to take.
FIRST = {"top": 1.0, "coupled": 0.8}
# Values that are considered, by the first one, which counts as if it were known to that factor.
_FACTORS, _FACTOR_KNOWN = 2.0 ** np.arange(-6.0, 1.5, 0.5), 8.0
# A token forgets this much of those before it.
_FORGOTTEN = 0.002


class Sharpness:
    """By rule, for all sessions of a draft: the one of some values under which the target's choices were likeliest.

    That a token is the target's choice has, as scores go, the chance of the softmax of the draft's logits by it (with a
    seed: of logits with noise). It is small where draft and target differ little, and then most tokens are certain.
    """

    def __init__(self) -> None:
        self._likelihoods: dict[str, np.ndarray] = {}  # by rule, (values,): logarithms

    def value(self, decoding: Decoding) -> float:
        """For a session's scores. Where the target draws freely it is the temperature: scores are q."""
        if _is_free(decoding):
            return decoding.sampling.temperature
        return float(_values(decoding)[self._of(decoding).argmax()])

    def learn(self, decoding: Decoding, growth: DynamicGrowth, tokens: Tokens) -> None:
        """From the committed tokens behind a tree's root."""
        if not _is_free(decoding) and (seen := list(_choices(growth, tokens))):
            likelihoods = self._of(decoding)
            likelihoods *= (1.0 - _FORGOTTEN) ** len(seen)
            likelihoods += _likelihoods(seen, _values(decoding))

    def _of(self, decoding: Decoding) -> np.ndarray:
        first = -0.5 * (np.log(_FACTORS) / math.log(_FACTOR_KNOWN)) ** 2
        return self._likelihoods.setdefault(decoding.rule.name, first)


def _values(decoding: Decoding) -> np.ndarray:
    return FIRST[decoding.rule.children] * _FACTORS


def _is_free(decoding: Decoding) -> bool:
    return decoding.rule.children != "coupled" and decoding.sampling.temperature > 0.0


def _choices(growth: DynamicGrowth, tokens: Tokens) -> Sequence[tuple[np.ndarray, int]]:
    """Of each node on the way whose children were ranked: their logits, up to a constant, and which was chosen."""
    seen, path = [], [0, *growth.tree().follow(tokens)]
    for node, token in zip(path, tokens, strict=False):
        ranked = growth.ranked.get(node)
        if ranked is not None and token in ranked.token_ids:
            seen.append((np.array(ranked.scores) * growth.sharpness, ranked.token_ids.index(token)))
    return seen


def _likelihoods(seen: Sequence[tuple[np.ndarray, int]], values: np.ndarray) -> np.ndarray:
    """(values,) the logarithm of the chance of all these choices."""
    width = max(len(logits) for logits, _ in seen)
    table, chosen = np.full((len(seen), width), -math.inf), np.array([rank for _, rank in seen])
    for row, (logits, _) in enumerate(seen):
        table[row, : len(logits)] = logits - logits[0]
    scaled = table / values[:, None, None]  # (values, choices, width)
    own = np.take_along_axis(scaled, chosen[None, :, None], 2)[..., 0]
    return (own - np.log(np.exp(scaled).sum(2))).sum(1)
