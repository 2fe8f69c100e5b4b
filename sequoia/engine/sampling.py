"""The target's p, its draws, and the one source of chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.noise import gumbel_noise, gumbel_rows, streams
from sequoia.engine.transfer import upload
from sequoia.errors import Internal
from sequoia.sampling import Sampling


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

    def race(self, logs: Tensor) -> Tensor:
        """For each row of logs (rows, n) an index with probability proportional to exp(logs): (rows,) int64."""
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

    def race(self, logs: Tensor) -> Tensor:
        """By noise on each, with a fresh key: the host waits for nothing, and an index of weight 0 never wins."""
        key = int(self._generator.integers(2**64, dtype=np.uint64))
        [keys] = upload((streams(key, range(len(logs)))[:, None],), logs.device)
        return gumbel_rows(keys, torch.arange(logs.shape[1], device=logs.device)).add_(logs).argmax(1)


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
        scaled = scaled.masked_fill(~largest(scaled, scaled.topk(sampling.top_k).values), -math.inf)
    if sampling.top_p < 1.0:
        p = scaled.softmax(0)
        scaled = scaled.masked_fill(~largest(p, _nucleus(p, sampling.top_p)), -math.inf)
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


def _known(values: Mapping[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (int64) and values (float64) as tensors beside `like`, without ids outside its vocabulary."""
    kept = {token_id: value for token_id, value in values.items() if token_id < len(like)}
    ids, numbers = upload((np.array(list(kept), np.int64), np.array(list(kept.values()), np.float64)), like.device)
    return ids, numbers


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """The fewest largest probabilities, descending, that hold `top_p` of the mass. Never sorts the vocabulary."""
    width = 256
    while True:
        largest = p.topk(min(width, len(p))).values
        reached = (largest.cumsum(0) >= top_p).nonzero()
        if len(reached) or width >= len(p):
            return largest[: int(reached[0]) + 1] if len(reached) else largest
        width *= 8


def largest(values: Tensor, kept: Tensor) -> Tensor:
    """Mask of the `len(kept)` largest of `values`, where `kept` holds them in descending order; ties by smaller id."""
    threshold = kept[-1]
    mask = values > threshold
    ties = (values == threshold).nonzero()[:, 0]
    mask[ties[: len(kept) - int(mask.sum())]] = True
    return mask


def _peak(logits: Tensor) -> Tensor:
    """The largest logit; NaN anywhere makes it NaN."""
    peak = logits.max()
    check_peak(float(peak))
    return peak


def check_peak(peak: float) -> None:
    """Raises Internal when the target's largest logit is no finite number."""
    if not math.isfinite(peak):
        raise Internal(f"the target model's largest logit is {peak}; its weights or dtype are broken")
