"""Children of a tree's nodes: the draft's truncated q, draws from it, and the tokens of a coupled race."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import largest
from sequoia.sampling import Sampling
from sequoia.topology import DraftDistributions

# Candidates kept of a draft distribution: at 32 the loss of tokens per step is at most 1 %.
DRAFT_WIDTH = 32
# Candidates to which the drafter adds noise. Tokens further down q seldom win the race.
COUPLED_WIDTH = 256
# In q no candidate is less likely than 2**-10 of the one before it. However cold the draft, the second child then comes
# before the third: without this the trees of low temperatures would have one child a node. It costs 0.1 % at rank 0.
_MOST_DROP = 10 * math.log(2.0)


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
    candidates = largest(logits, logits.topk(count).values).nonzero()[:, 0]
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
