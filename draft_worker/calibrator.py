"""How well a draft's logits tell what the target will choose: learnt from what it has chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from draft_worker.choosing import Tokens
from draft_worker.dynamic import DynamicGrowth
from sequoia.engine.children import Calibration
from sequoia.sampling import Decoding

# Before anything is learnt: q itself; and what a coupled race was once measured to take.
FIRST = {"top": 1.0, "coupled": 0.8}
# Values that are considered, by the first one, which counts as if it were known to that factor.
_FACTORS, _FACTOR_KNOWN = 2.0 ** np.arange(-6.0, 1.5, 0.5), 8.0
# Choices that are taken to have been seen before the first, and those of them that were none of the draft's.
_FIRST_CHOICES, _FIRST_MISSES = 100.0, 1.0
# However seldom a draft ranks what is chosen, its chances are above 0.
_LEAST_HIT = 0.001
# A choice forgets this much of those before it.
_FORGOTTEN = 0.002


class Calibrator:
    """By rule, for all sessions of a draft: what the chances of tokens follow from.

    That a token which the draft ranks is the target's choice has the chance of the softmax of the draft's logits (with
    a seed: and noise) by the sharpness, the one of some values under which the target's choices were likeliest. It is
    small where draft and target differ little, and then most tokens are certain, but for the share of choices that the
    draft did not rank at all.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}  # by rule

    def value(self, decoding: Decoding) -> Calibration:
        """For a session's scores. Where the target draws freely they are q."""
        if _is_free(decoding):
            return Calibration(decoding.sampling.temperature, 1.0)
        return self._of(decoding).calibration

    def learn(self, decoding: Decoding, growth: DynamicGrowth, tokens: Tokens) -> None:
        """From the committed tokens behind a tree's root."""
        if not _is_free(decoding):
            self._of(decoding).add(list(_choices(growth, tokens)))

    def _of(self, decoding: Decoding) -> _Seen:
        return self._seen.setdefault(decoding.rule.name, _Seen(FIRST[decoding.rule.children]))


class _Seen:
    """The choices of targets under one rule."""

    def __init__(self, first: float) -> None:
        self._values = first * _FACTORS
        self._likelihoods = -0.5 * (np.log(_FACTORS) / math.log(_FACTOR_KNOWN)) ** 2  # (values,) logarithms
        self._num_choices, self._num_misses = _FIRST_CHOICES, _FIRST_MISSES

    @property
    def calibration(self) -> Calibration:
        hit = max(_LEAST_HIT, 1.0 - self._num_misses / self._num_choices)
        return Calibration(float(self._values[self._likelihoods.argmax()]), hit)

    def add(self, choices: Sequence[tuple[np.ndarray, int]]) -> None:
        """Logits of a node's ranked tokens, and which of them was chosen, below 0: another one."""
        kept = (1.0 - _FORGOTTEN) ** len(choices)
        hits = [(logits, rank) for logits, rank in choices if rank >= 0]
        self._num_choices = kept * self._num_choices + len(choices)
        self._num_misses = kept * self._num_misses + len(choices) - len(hits)
        self._likelihoods *= kept
        if hits:
            self._likelihoods += _likelihoods(hits, self._values)


def _is_free(decoding: Decoding) -> bool:
    return decoding.rule.children != "coupled" and decoding.sampling.temperature > 0.0


def _choices(growth: DynamicGrowth, tokens: Tokens) -> Iterable[tuple[np.ndarray, int]]:
    """Of each node on the way whose children were ranked: their logits, up to a constant, and which was chosen."""
    for node, token in zip([0, *growth.tree().follow(tokens)], tokens, strict=False):
        ranked = growth.ranked.get(node)
        if ranked is not None and ranked.token_ids:
            rank = ranked.token_ids.index(token) if token in ranked.token_ids else -1
            yield np.array(ranked.scores) * growth.calibration.sharpness, rank


def _likelihoods(hits: Sequence[tuple[np.ndarray, int]], values: np.ndarray) -> np.ndarray:
    """(values,) the logarithm of the chance of all these choices, given that they were ranked."""
    width = max(len(logits) for logits, _ in hits)
    table, chosen = np.full((len(hits), width), -math.inf), np.array([rank for _, rank in hits])
    for row, (logits, _) in enumerate(hits):
        table[row, : len(logits)] = logits - logits[0]
    scaled = table / values[:, None, None]  # (values, choices, width)
    own = np.take_along_axis(scaled, chosen[None, :, None], 2)[..., 0]
    return (own - np.log(np.exp(scaled).sum(2))).sum(1)
