"""Children of whole rows at once, where the logits are and without a look at them: `children.py` for a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sequoia.engine.children import DRAFT_WIDTH, MOST_DROP
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import COUPLED_WIDTH
from sequoia.sampling import Sampling


def draft_weights(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`draft_distributions` of rows (rows, vocabulary): ids int64 and weights float32, (rows, at most DRAFT_WIDTH)."""
    ids, logs = _candidates(logits, sampling, DRAFT_WIDTH)
    allowed = torch.arange(ids.shape[1], device=ids.device).double() * MOST_DROP
    floored = torch.where(logs > -math.inf, (logs + allowed).cummax(1).values - allowed, -math.inf)
    return ids, floored.exp().float().bfloat16().float()


def drawn_ranking(ids: Tensor, weights: Tensor, exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """`draw_children` of rows: ids (rows, width) in draw order, and how many of them q has, (rows,).

    `exponentials` are standard ones, (rows, at least width) float64.
    """
    rates = weights.double()
    clocks = torch.where(rates > 0.0, exponentials[:, : rates.shape[1]] / rates, math.inf)
    return ids.gather(1, clocks.argsort(dim=1, stable=True)), (rates > 0.0).sum(dim=1)


def coupled_ranking(logits: Tensor, sampling: Sampling, position: int) -> tuple[Tensor, Tensor]:
    """`coupled_children` of rows: ids (rows, width) by log q + noise, best first, and how many q has, (rows,)."""
    assert sampling.seed is not None, "the coupled rule needs a seed"
    ids, logs = _candidates(logits, sampling, COUPLED_WIDTH)
    races = logs + gumbel_noise(sampling.seed, position, ids)
    return ids.gather(1, races.argsort(dim=1, descending=True, stable=True)), (logs > -math.inf).sum(dim=1)


def top_ranking(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top_children` of rows (rows, vocabulary): ids (rows, at most count), and how many are above -inf, (rows,).

    The largest of integers that hold a logit's order above, the order of its bits made that of its value, and the
    falling order of ids below: no two are equal, so topk has nothing to choose.
    """
    bits = (logits.float() + 0.0).view(torch.int32).long()  # the sum makes -0 and 0 one
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = 2**32 - 1
    keys = (ordered << 32) | (last - torch.arange(logits.shape[1], device=logits.device))
    ids = last - (keys.topk(min(count, logits.shape[1])).values & last)
    return ids, (logits.gather(1, ids) > -math.inf).sum(dim=1)


def _candidates(logits: Tensor, sampling: Sampling, width: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of rows (rows, vocabulary) and log q float64 up to a constant, descending; -inf: cut."""
    ids, _ = top_ranking(logits, min(width, sampling.top_k or width))
    values = logits.gather(1, ids).double()
    peaks = values[:, :1]
    logs = ((values - peaks) / sampling.temperature).masked_fill(~logits.amax(1, keepdim=True).isfinite(), -math.inf)
    if sampling.min_p > 0.0:
        logs = logs.masked_fill(logs < math.log(sampling.min_p), -math.inf)
    if sampling.top_p < 1.0:
        weights = logs.exp()
        is_cut = sampling.top_k or sampling.min_p
        every = weights if is_cut else ((logits.float() - peaks.float()) / sampling.temperature).exp()
        mass = every.sum(1, keepdim=True)
        logs = logs.masked_fill(weights.cumsum(1) - weights >= sampling.top_p * mass, -math.inf)
    return ids, logs
