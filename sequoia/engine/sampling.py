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

from sequoia.engine.largest import largest, on_host
from sequoia.engine.noise import DRAW_FROM_OTHERS, OTHERS, gumbel_noise, gumbel_rows, streams, uniform_noise
from sequoia.engine.transfer import upload
from sequoia.errors import Internal
from sequoia.sampling import Constraint, Sampling
from sequoia.topology import Int

# Tokens with noise of their own, of p and of q. In q those further down seldom win the race.
COUPLED_WIDTH = 256


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

    def uniform(self) -> float:
        """A number uniform in [0, 1): the share of a distribution that is before what is drawn."""
        ...


class RandomChoices:
    """Choices from a generator; every call uses fresh random numbers in float64."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def accept(self, numerator: float, denominator: float) -> bool:
        """Strict, because the uniform number can be 0 and an impossible token must never pass."""
        return self.uniform() * denominator < numerator

    def draw(self, weights: Tensor) -> int:
        """By inversion; an index of weight 0 is never drawn."""
        return _invert(weights, self.uniform())

    def race(self, logs: Tensor) -> Tensor:
        """By noise on each, with a fresh key: the host waits for nothing, and an index of weight 0 never wins."""
        key = int(self._generator.integers(2**64, dtype=np.uint64))
        [keys] = upload((streams(key, range(len(logs)))[:, None],), logs.device)
        return gumbel_rows(keys, torch.arange(logs.shape[1], device=logs.device)).add_(logs).argmax(1)

    def uniform(self) -> float:
        """In steps of 2**-53."""
        return float(self._generator.random())


def adjusted_logits(logits: Tensor, sampling: Sampling, path: Path, constraint: Constraint | None = None) -> Tensor:
    """One row of logits (vocabulary,) as float64 with what acts before the temperature: bias, min_tokens,
    `json_schema` by its constraint, penalties.

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
    if sampling.json_schema is not None:
        assert constraint is not None, "a schema that nobody has read"
        if (allowed := constraint.allowed(path.generated)) is not None:
            [forbidden] = upload((~allowed[: len(adjusted)],), adjusted.device)
            adjusted.masked_fill_(forbidden, -math.inf)
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
    scaled = (adjusted - finite_peak(on_host(adjusted).max())).div_(sampling.temperature)
    if sampling.min_p > 0.0:
        scaled.masked_fill_(scaled < math.log(sampling.min_p), -math.inf)
    if 0 < sampling.top_k < len(scaled):
        scaled = _only(scaled, largest(on_host(scaled), sampling.top_k))
    if sampling.top_p < 1.0:
        scaled = _only(scaled, _nucleus(scaled, sampling.top_p))
    return scaled


def target_distribution(adjusted: Tensor, sampling: Sampling) -> Tensor:
    """p of one row of adjusted logits (vocabulary,): float64, sums to 1."""
    weights = log_weights(adjusted, sampling).exp_()
    return weights.div_(weights.sum())


def argmax(logits: Tensor) -> int:
    """The most likely token of a row (vocabulary,); ties go to the smaller id. Raises Internal on NaN."""
    values = on_host(logits)
    token = int(values.argmax())
    finite_peak(values[token])
    return token


def coupled_token(adjusted: Tensor, sampling: Sampling, position: int, width: int = COUPLED_WIDTH) -> int:
    """A draw from p that is the same whatever the draft, the tree, or the process.

    The `width` likeliest tokens race, each with log p + its noise, and against them all other tokens as one, with the
    log of their mass and noise of its own, which is how the best of their races is distributed (Gumbel-max). If the
    others win, one of them is drawn by inversion. So only a few tokens' noise is ever computed.
    """
    assert sampling.seed is not None, "the coupled rule needs a seed"
    logs = log_weights(adjusted, sampling)
    ids = torch.from_numpy(largest(on_host(logs), width)).to(logs.device)
    races = gumbel_noise(sampling.seed, position, ids).add_(logs[ids])
    best = int(races.argmax())
    if len(ids) < width:
        return int(ids[best])
    others = logs.exp_().index_fill_(0, ids, 0.0)
    mass = float(others.sum())
    own = torch.tensor([OTHERS, DRAW_FROM_OTHERS], device=logs.device)
    if mass <= 0.0 or math.log(mass) + float(gumbel_noise(sampling.seed, position, own[:1])) <= float(races[best]):
        return int(ids[best])
    return _invert(others, float(uniform_noise(sampling.seed, position, own[1:])))


def _invert(weights: Tensor, uniform: float) -> int:
    """The index where the running sum of weights (n,) first exceeds that share of their total."""
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return index if index < len(weights) else int(weights.nonzero()[-1])


def _known(values: Mapping[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (int64) and values (float64) as tensors beside `like`, without ids outside its vocabulary."""
    kept = {token_id: value for token_id, value in values.items() if token_id < len(like)}
    ids, numbers = upload((np.array(list(kept), np.int64), np.array(list(kept.values()), np.float64)), like.device)
    return ids, numbers


def _nucleus(logs: Tensor, top_p: float) -> Int:
    """The fewest largest entries of log p (up to a constant) that hold `top_p` of the mass, without sorting all."""
    values, weights = on_host(logs), on_host(logs.exp())
    wanted, width = top_p * weights.sum(), 256
    while True:
        ids = largest(values, width)
        reached = np.flatnonzero(weights[ids].cumsum() >= wanted)
        if len(reached) or len(ids) < width:
            return ids[: reached[0] + 1] if len(reached) else ids
        width *= 8


def _only(logs: Tensor, ids: Int) -> Tensor:
    """The entries at `ids`, and -inf elsewhere."""
    kept = torch.from_numpy(ids).to(logs.device)
    return torch.full_like(logs, -math.inf).index_copy_(0, kept, logs[kept])


def finite_peak(largest_logit: float) -> float:
    """The largest logit of a row; NaN anywhere makes it NaN. Raises Internal when it is no finite number."""
    if not math.isfinite(largest_logit):
        raise Internal(f"the target model's largest logit is {largest_logit}; its weights or dtype are broken")
    return float(largest_logit)
