"""Distributions and draws: the target's p, the draft's truncated q, children, and the one source of chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.noise import gumbel_noise
from sequoia.errors import Internal
from sequoia.sampling import Sampling
from sequoia.topology import DraftDistributions

# Candidates kept of a draft distribution: at 32 the loss of tokens per step is at most 1 %.
DRAFT_WIDTH = 32
# Candidates to which the drafter adds noise. Tokens further down q seldom win the race.
COUPLED_WIDTH = 256
# In q no candidate is less likely than 2**-10 of the one before it. However cold the draft, the second child then comes
# before the third: without this the trees of low temperatures would have one child a node. It costs 0.1 % at rank 0.
_MOST_DROP = 10 * math.log(2.0)


@dataclass(frozen=True, slots=True)
class Path:
    """The tokens before a draw: the committed ones, of which the first are the prompt's, and those on a tree's path."""

    committed: tuple[int, ...]
    num_prompt_tokens: int
    drafted: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """Of the token to be drawn, counted from the first prompt token."""
        return len(self.committed) + len(self.drafted)

    @property
    def num_generated(self) -> int:
        """Tokens behind the prompt."""
        return self.position - self.num_prompt_tokens

    @property
    def generated(self) -> tuple[int, ...]:
        """The tokens behind the prompt."""
        return self.committed[self.num_prompt_tokens :] + self.drafted


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


def adjusted_logits(logits: Tensor, sampling: Sampling, path: Path) -> Tensor:
    """One row of logits (vocabulary,) as float64 with what acts before the temperature: bias, min_tokens, penalties.

    Repetition: positive logits of tokens in prompt or answer are divided by the penalty, negative ones multiplied.
    Presence and frequency: subtracted once, and once per occurrence, for tokens of the answer.
    """
    adjusted = logits.double()
    if not sampling.adjusts(path.num_generated):
        return adjusted
    adjusted = adjusted.clone()
    if sampling.logit_bias:
        ids, biases = _known(dict(sampling.logit_bias), adjusted)
        adjusted[ids] += biases
    if path.num_generated < sampling.min_tokens:
        adjusted[_known(dict.fromkeys(sampling.stop_token_ids, 0.0), adjusted)[0]] = -math.inf
    if sampling.repetition_penalty != 1.0:
        ids, _ = _known(dict.fromkeys((*path.committed, *path.drafted), 0.0), adjusted)
        seen, penalty = adjusted[ids], sampling.repetition_penalty
        adjusted[ids] = torch.where(seen > 0.0, seen / penalty, seen * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        ids, counts = _known(dict(Counter(path.generated)), adjusted)
        adjusted[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return adjusted


def log_weights(adjusted: Tensor, sampling: Sampling) -> Tensor:
    """log p up to a constant, (vocabulary,) float64, 0 at its largest and -inf where cut: temperature, then the cuts.

    Ties at a cut are resolved by (logit descending, id ascending). Raises Internal when the logits have no finite
    largest value, as with NaN.
    """
    scaled = (adjusted - _peak(adjusted)) / sampling.temperature
    if sampling.min_p > 0.0:
        scaled = scaled.masked_fill(scaled < math.log(sampling.min_p), -math.inf)
    if 0 < sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(~_largest(scaled, scaled.topk(sampling.top_k).values), -math.inf)
    if sampling.top_p < 1.0:
        p = scaled.softmax(0)
        scaled = scaled.masked_fill(~_largest(p, _nucleus(p, sampling.top_p)), -math.inf)
    return scaled


def target_distribution(adjusted: Tensor, sampling: Sampling) -> Tensor:
    """p of one row of adjusted logits (vocabulary,): float64, sums to 1."""
    return log_weights(adjusted, sampling).softmax(0)


def argmax(logits: Tensor) -> int:
    """The most likely token of a row (vocabulary,); ties go to the smaller id. Raises Internal on NaN."""
    _peak(logits)
    return int(logits.argmax())


def coupled_token(adjusted: Tensor, sampling: Sampling, position: int) -> int:
    """argmax(log p + noise): a draw from p that is the same whatever the draft, the tree, or the process."""
    assert sampling.seed is not None, "the coupled rule needs a seed"
    ids = torch.arange(len(adjusted), device=adjusted.device)
    return int(gumbel_noise(sampling.seed, position, ids).add_(log_weights(adjusted, sampling)).argmax())


def draft_distributions(logits: Tensor, sampling: Sampling, width: int = DRAFT_WIDTH) -> DraftDistributions:
    """q of some rows of logits (rows, vocabulary): the same cuts as p, at most `width` tokens, bfloat16 weights.

    q is ours to choose, so its rounding costs acceptance and never exactness.
    """
    ids, logs = _draft_candidates(logits, sampling, width)
    allowed = torch.arange(ids.shape[1], device=ids.device) * _MOST_DROP
    floored = torch.where(logs > -math.inf, (logs + allowed).cummax(1).values - allowed, -math.inf)
    weights = floored.exp().bfloat16().float()
    return DraftDistributions(ids.cpu().numpy().astype(np.uint32), weights.cpu().numpy())


def draw_children(q: DraftDistributions, row: int, count: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Up to `count` tokens drawn one after another without replacement from q's row, in draw order.

    The order of independent exponential clocks with rates q is the order of such draws; fewer tokens than `count`
    come back when q has fewer.
    """
    rates = q.weights[row].astype(np.float64)
    support = np.flatnonzero(rates)
    clocks = generator.standard_exponential(len(support)) / rates[support]
    return tuple(int(token) for token in q.token_ids[row][support[np.argsort(clocks, kind="stable")[:count]]])


def coupled_children(
    logits: Tensor, sampling: Sampling, position: int, counts: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """For each row of logits (rows, vocabulary) the `counts[row]` tokens of the largest log q + noise, best first.

    The children of one depth share `position`, and with it the noise.
    """
    assert sampling.seed is not None, "the coupled rule needs a seed"
    ids, logs = _draft_candidates(logits, sampling, COUPLED_WIDTH)
    races = logs.double() + gumbel_noise(sampling.seed, position, ids)
    order = races.argsort(dim=1, descending=True, stable=True)
    finite = (logs > -math.inf).sum(dim=1).tolist()
    ranked = ids.gather(1, order).tolist()
    return tuple(tuple(row[: min(count, most)]) for row, count, most in zip(ranked, counts, finite, strict=True))


def top_children(logits: Tensor, count: int) -> tuple[int, ...]:
    """The `count` most likely tokens of one row (vocabulary,), by (logit descending, id ascending)."""
    count = min(count, len(logits))
    values, ids = (each.tolist() for each in logits.topk(min(count + 1, len(logits))))
    if len(ids) == count or values[count - 1] > values[count]:
        # No tie at the cut: the candidates are these, in whatever order topk has equal ones.
        ranked = sorted(zip(values[:count], ids[:count], strict=True), key=lambda each: (-each[0], each[1]))
        return tuple(token for _, token in ranked)
    candidates = _largest(logits, logits.topk(count).values).nonzero()[:, 0]
    order = logits[candidates].sort(descending=True, stable=True).indices
    return tuple(int(token) for token in candidates[order])


def _draft_candidates(logits: Tensor, sampling: Sampling, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row and log q up to a constant, (rows, at most width), descending; -inf where cut.

    A row with NaN has no candidates.
    """
    width = min(width, logits.shape[1], sampling.top_k or width)
    top = logits.float().topk(width)
    logs = ((top.values - top.values[:, :1]) / sampling.temperature).nan_to_num(nan=-math.inf, neginf=-math.inf)
    if sampling.min_p > 0.0:
        logs = logs.masked_fill(logs < math.log(sampling.min_p), -math.inf)
    if sampling.top_p < 1.0:
        weights = logs.exp()
        mass = weights.sum(1, keepdim=True)
        if not sampling.top_k and not sampling.min_p:
            mass = ((logits.float() - top.values[:, :1]) / sampling.temperature).exp().sum(1, keepdim=True)
        mass_before = weights.cumsum(1) - weights
        logs = logs.masked_fill(mass_before >= sampling.top_p * mass, -math.inf)
    return top.indices, logs


def _known(values: Mapping[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (int64) and values (float64) as tensors beside `like`, without ids outside its vocabulary."""
    kept = {token_id: value for token_id, value in values.items() if token_id < len(like)}
    ids = torch.tensor(list(kept), dtype=torch.int64, device=like.device)
    return ids, torch.tensor(list(kept.values()), dtype=torch.float64, device=like.device)


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


def _peak(logits: Tensor) -> Tensor:
    """The largest logit; NaN anywhere makes it NaN."""
    peak = logits.max()
    if not bool(peak.isfinite()):
        raise Internal(f"the target model's largest logit is {float(peak)}; its weights or dtype are broken")
    return peak
