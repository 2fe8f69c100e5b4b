"""Distributions and draws: the target's p, the draft's truncated q, children from q, and the one source of chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sequoia.errors import Internal
from sequoia.topology import DraftDistributions

# Candidates kept of a draft distribution: at 32 the loss of tokens per step is at most 1 %.
DRAFT_WIDTH = 32
_MAX_WEIGHT = 2**16 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """A request's sampling parameters with every default filled in."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the target's argmax is the answer."""
        return self.temperature == 0.0


class Choices(Protocol):
    """The only source of chance in verification: a test replaces it by an enumerator."""

    def accept(self, numerator: float, denominator: float) -> bool:
        """True with probability min(1, numerator / denominator)."""
        ...

    def draw(self, weights: Tensor) -> int:
        """An index with probability proportional to its weight, (n,) float64."""
        ...


class RandomChoices:
    """Choices from a generator; every call uses fresh random numbers in float64."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def accept(self, numerator: float, denominator: float) -> bool:
        """Strict, because the uniform number can be 0 and an impossible token must never pass."""
        return self._generator.random() * denominator < numerator

    def draw(self, weights: Tensor) -> int:
        """By inversion; an index of weight 0 is never drawn."""
        cumulative = weights.cumsum(0)
        total = float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, self._generator.random() * total, right=True))
        return index if index < len(weights) else int(weights.nonzero()[-1])


def argmax(logits: Tensor) -> int:
    """The most likely token of a row (vocabulary,); ties go to the smaller id. Raises Internal on NaN."""
    _refuse_nan(logits)
    return int(logits.argmax())


def target_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """p of one row of logits (vocabulary,): float64, sums to 1. Temperature, then top-k, then top-p.

    Ties at a cut are resolved by (logit descending, id ascending). Raises Internal on NaN logits.
    """
    _refuse_nan(logits)
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        largest = scaled.topk(sampling.top_k).values
        scaled = scaled.masked_fill(~_largest(scaled, largest), float("-inf"))
    p = scaled.softmax(0)
    if sampling.top_p < 1.0:
        p = torch.where(_largest(p, _nucleus(p, sampling.top_p)), p, 0.0)
        p /= p.sum()
    return p


def draft_distributions(logits: Tensor, sampling: Sampling) -> DraftDistributions:
    """q of some rows of logits (rows, vocabulary): the same cuts as p, at most DRAFT_WIDTH tokens, integer weights.

    q is ours to choose, so its rounding costs acceptance and never exactness.
    """
    width = min(DRAFT_WIDTH, logits.shape[1], sampling.top_k or DRAFT_WIDTH)
    scaled = logits.float() / sampling.temperature
    top = scaled.topk(width)
    probabilities = (top.values - scaled.logsumexp(1, keepdim=True)).exp()
    if sampling.top_p < 1.0:
        mass_before = probabilities.cumsum(1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= sampling.top_p, 0.0)
    weights = (probabilities / probabilities[:, :1] * _MAX_WEIGHT).round().nan_to_num(0.0)
    return DraftDistributions(top.indices.cpu().numpy().astype(np.uint32), weights.cpu().numpy().astype(np.uint16))


def draw_children(q: DraftDistributions, row: int, count: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Up to `count` tokens drawn one after another without replacement from q's row, in draw order.

    The order of independent exponential clocks with rates q is the order of such draws; fewer tokens than `count`
    come back when q has fewer.
    """
    rates = q.weights[row].astype(np.float64)
    support = np.flatnonzero(rates)
    clocks = generator.standard_exponential(len(support)) / rates[support]
    return tuple(int(token) for token in q.token_ids[row][support[np.argsort(clocks, kind="stable")[:count]]])


def top_children(logits: Tensor, count: int) -> tuple[int, ...]:
    """The `count` most likely tokens of one row (vocabulary,), by (logit descending, id ascending)."""
    count = min(count, len(logits))
    candidates = _largest(logits, logits.topk(count).values).nonzero()[:, 0]
    order = logits[candidates].sort(descending=True, stable=True).indices
    return tuple(int(token) for token in candidates[order])


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """The fewest largest probabilities, descending, that hold `top_p` of the mass. Never sorts the vocabulary."""
    width = 256
    while True:
        largest = p.topk(min(width, len(p))).values
        reached = (largest.cumsum(0) >= top_p).nonzero()
        if len(reached) or width >= len(p):
            return largest[: int(reached[0]) + 1] if len(reached) else largest
        width *= 8


def _largest(values: Tensor, kept: Tensor) -> Tensor:
    """Mask of the `len(kept)` largest of `values`, where `kept` holds them in descending order; ties by smaller id."""
    threshold = kept[-1]
    mask = values > threshold
    ties = (values == threshold).nonzero()[:, 0]
    mask[ties[: len(kept) - int(mask.sum())]] = True
    return mask


def _refuse_nan(logits: Tensor) -> None:
    if bool(logits.isnan().any()):
        raise Internal("the target model produced NaN logits; its weights or dtype are broken")
