"""Children of a tree's nodes: the draft's truncated q, draws from it, and the tokens of a coupled race.

Row by row on the host; `rankings.py` has the same for whole rows of a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sequoia.engine.largest import largest, on_host
from sequoia.engine.noise import gumbel_noise
from sequoia.engine.sampling import COUPLED_WIDTH
from sequoia.sampling import Sampling
from sequoia.topology import DraftDistributions, Int

Float = NDArray[np.float64]

# Candidates kept of a draft distribution: at 32 the loss of tokens per step is at most 1 %.
DRAFT_WIDTH = 32
# In q no candidate is less likely than 2**-10 of the one before it. However cold the draft, the second child then comes
# before the third: without this the trees of low temperatures would have one child a node. It costs 0.1 % at rank 0.
MOST_DROP = 10 * math.log(2.0)


def draft_distributions(logits: Tensor, sampling: Sampling, width: int = DRAFT_WIDTH) -> DraftDistributions:
    """q of some rows of logits (rows, vocabulary): the same cuts as p, at most `width` tokens, bfloat16 weights.

    q is ours to choose, so its rounding costs acceptance and never exactness.
    """
    return distributions_of([_draft_candidates(row, sampling, width) for row in logits])


def distributions_of(candidates: Sequence[tuple[Int, Float]]) -> DraftDistributions:
    """q of some rows of token ids and their log q, up to a constant and at most 0; descending."""
    shape = len(candidates), max(1, *(len(ids) for ids, _ in candidates))
    token_ids, weights = np.zeros(shape, np.uint32), np.zeros(shape, np.float32)
    for row, (ids, logs) in enumerate(candidates):
        allowed = np.arange(len(ids)) * MOST_DROP
        floored = np.maximum.accumulate(logs + allowed) - allowed
        token_ids[row, : len(ids)], weights[row, : len(ids)] = ids, np.exp(floored)
    return DraftDistributions(token_ids, torch.from_numpy(weights).bfloat16().float().numpy())


def draw_children(q: DraftDistributions, row: int, count: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Up to `count` tokens drawn one after another without replacement from q's row, in draw order.

    The order of independent exponential clocks with rates q is the order of such draws; fewer tokens than `count`
    come back when q has fewer. A row costs `DRAFT_WIDTH` numbers, so that a tree's are known before its tokens.
    """
    rates = q.weights[row].astype(np.float64)
    support = np.flatnonzero(rates)
    clocks = generator.standard_exponential(max(DRAFT_WIDTH, len(rates)))[support] / rates[support]
    return tuple(int(token) for token in q.token_ids[row][support[np.argsort(clocks, kind="stable")[:count]]])


def coupled_children(
    logits: Tensor, sampling: Sampling, position: int, counts: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """For each row of logits (rows, vocabulary) the `counts[row]` tokens of the largest log q + noise, best first.

    The children of one depth share `position`, and with it the noise.
    """
    races = zip(_races(logits, sampling, position), counts, strict=True)
    return tuple(_best(ids, race, count).token_ids for (ids, race), count in races)


def top_children(logits: Tensor, count: int) -> tuple[int, ...]:
    """The `count` most likely tokens of one row (vocabulary,), by (logit descending, id ascending)."""
    return tuple(largest(on_host(logits), count).tolist())


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens that a node may have as children, and the logarithms of the chances that the draft gives them."""

    token_ids: tuple[int, ...]
    scores: tuple[float, ...]  # falling, at most 0


class Calibration(NamedTuple):
    """How the chances of a node's tokens follow from a draft's logits."""

    sharpness: float  # see `scored_top_children`
    hit: float  # the chance, above 0, that the target's choice is one of the tokens that are ranked


def scored_top_children(
    logits: Tensor, sampling: Sampling, counts: Sequence[int], sharpness: float
) -> tuple[ScoredTokens, ...]:
    """`top_children` of rows (rows, vocabulary), with the logarithm of each one's chance to be the target's choice too.

    Chances are the softmax of the `COUPLED_WIDTH` largest logits by `sharpness`: by the temperature they are q; the
    nearer the draft's logits lie to the target's, the smaller is what tells which of them will be the target's largest.
    None of a row whose largest is not finite.
    """
    scale = sampling.temperature / sharpness
    candidates = (_draft_candidates(row, sampling, COUPLED_WIDTH) for row in logits)
    return tuple(scored(ids, logs, scale, count) for (ids, logs), count in zip(candidates, counts, strict=True))


def scored_coupled_children(
    logits: Tensor, sampling: Sampling, position: int, counts: Sequence[int], sharpness: float
) -> tuple[ScoredTokens, ...]:
    """The same of `coupled_children`: of the logits, with T times the noise."""
    scale = sampling.temperature / sharpness
    races = zip(_races(logits, sampling, position), counts, strict=True)
    return tuple(scored(ids, race, scale, count) for (ids, race), count in races)


def scored(ids: Int, logs: Float, scale: float, count: int) -> ScoredTokens:
    """The `count` largest of `logs`, and the logarithm of the softmax of `scale` times all of them."""
    if not len(ids):
        return ScoredTokens((), ())
    best = _best(ids, logs, count)
    scaled = (logs - logs.max()) * scale
    scores = (np.array(best.scores) - logs.max()) * scale - math.log(np.exp(scaled).sum())
    return ScoredTokens(best.token_ids, tuple(scores.tolist()))


def _best(ids: Int, logs: Float, count: int) -> ScoredTokens:
    """Those of the `count` largest of `logs`, of equal ones the first."""
    order = np.argsort(-logs, kind="stable")[:count]
    return ScoredTokens(tuple(ids[order].tolist()), tuple(logs[order].tolist()))


def _races(logits: Tensor, sampling: Sampling, position: int) -> Iterable[tuple[Int, Float]]:
    """By row of logits (rows, vocabulary) its candidates, and log q + noise."""
    assert sampling.seed is not None, "the coupled rule needs a seed"
    candidates = [_draft_candidates(row, sampling, COUPLED_WIDTH) for row in logits]
    every_id = np.concatenate([ids for ids, _ in candidates])
    noise = gumbel_noise(sampling.seed, position, torch.from_numpy(every_id)).numpy()
    ends = np.cumsum([len(ids) for ids, _ in candidates])
    own = np.split(noise, ends[:-1])
    return ((ids, logs + each) for (ids, logs), each in zip(candidates, own, strict=True))


def _draft_candidates(logits: Tensor, sampling: Sampling, width: int) -> tuple[Int, Float]:
    """The likeliest tokens of a row (vocabulary,) that no parameter cuts, and log q up to a constant; descending.

    At most `width`, and none of a row with NaN.
    """
    values = on_host(logits)
    ids = largest(values, min(width, sampling.top_k or width))
    if not len(ids) or not math.isfinite(values.max()):
        return ids[:0], np.empty(0)
    peak = values[ids[0]]
    logs = (values[ids].astype(np.float64) - peak) / sampling.temperature
    if sampling.min_p > 0.0:
        logs = logs[logs >= math.log(sampling.min_p)]
    if sampling.top_p < 1.0:
        weights = np.exp(logs)
        is_cut = sampling.top_k or sampling.min_p
        mass = weights.sum() if is_cut else np.exp((values - peak) / np.float32(sampling.temperature)).sum()
        logs = logs[weights.cumsum() - weights < sampling.top_p * mass]
    return ids[: len(logs)], logs
