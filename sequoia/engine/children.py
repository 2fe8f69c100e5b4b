"""Children of a tree's nodes: the draft's truncated q, draws from it, and the tokens of a coupled race."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import largest
from sequoia.engine.transfer import download
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
    ids, weights = download(draft_weights(logits, sampling, width))
    return DraftDistributions(ids.astype(np.uint32), weights)


def draft_weights(logits: Tensor, sampling: Sampling, width: int = DRAFT_WIDTH) -> tuple[Tensor, Tensor]:
    """`draft_distributions` where the logits are: ids int64 and weights float32, (rows, `draft_width`) each."""
    ids, logs = _draft_candidates(logits, sampling, width)
    allowed = torch.arange(ids.shape[1], device=ids.device) * _MOST_DROP
    floored = torch.where(logs > -math.inf, (logs + allowed).cummax(1).values - allowed, -math.inf)
    return ids, floored.exp().bfloat16().float()


def draft_width(vocab_size: int, sampling: Sampling, width: int = DRAFT_WIDTH) -> int:
    """Columns of q."""
    return min(width, vocab_size, sampling.top_k or width)


def draw_children(q: DraftDistributions, row: int, count: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Up to `count` tokens drawn one after another without replacement from q's row, in draw order.

    The order of independent exponential clocks with rates q is the order of such draws; fewer tokens than `count`
    come back when q has fewer. Every column of the row costs a number, so that a tree's numbers are known beforehand.
    """
    rates = q.weights[row].astype(np.float64)
    support = np.flatnonzero(rates)
    clocks = generator.standard_exponential(len(rates))[support] / rates[support]
    return tuple(int(token) for token in q.token_ids[row][support[np.argsort(clocks, kind="stable")[:count]]])


def coupled_children(
    logits: Tensor, sampling: Sampling, position: int, counts: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """For each row of logits (rows, vocabulary) the `counts[row]` tokens of the largest log q + noise, best first.

    The children of one depth share `position`, and with it the noise.
    """
    ranked, finite = download(coupled_ranking(logits, sampling, position))
    rows = zip(ranked.tolist(), counts, finite.tolist(), strict=True)
    return tuple(tuple(row[: min(count, most)]) for row, count, most in rows)


def coupled_ranking(logits: Tensor, sampling: Sampling, position: int) -> tuple[Tensor, Tensor]:
    """Each row's candidates by log q + noise, best first, (rows, width) int64, and how many of them q has, (rows,)."""
    assert sampling.seed is not None, "the coupled rule needs a seed"
    ids, logs = _draft_candidates(logits, sampling, COUPLED_WIDTH)
    races = logs.double() + gumbel_noise(sampling.seed, position, ids)
    order = races.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), (logs > -math.inf).sum(dim=1)


def drawn_ranking(ids: Tensor, weights: Tensor, exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_children` of whole rows: ids (rows, width) in draw order, and how many of them q has, (rows,).

    `exponentials` are standard ones, (rows, width) float64.
    """
    rates = weights.double()
    clocks = torch.where(rates > 0.0, exponentials / rates, math.inf)
    return ids.gather(1, clocks.argsort(dim=1, stable=True)), (rates > 0.0).sum(dim=1)


def top_ranking(logits: Tensor, count: int) -> Tensor:
    """`top_children` of whole rows (rows, vocabulary), without a look at them: (rows, at most count) int64.

    The largest of integers that hold a logit's order above, the order of its bits made that of its value, and the
    falling order of ids below: no two are equal, so topk has nothing to choose.
    """
    bits = (logits.float() + 0.0).view(torch.int32).long()  # the sum makes -0 and 0 one
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = 2**32 - 1
    keys = (ordered << 32) | (last - torch.arange(logits.shape[1], device=logits.device))
    return last - (keys.topk(min(count, logits.shape[1])).values & last)


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
    top = logits.float().topk(draft_width(logits.shape[1], sampling, width))
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
