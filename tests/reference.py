"""Sampling parameters by definition: plain Python over lists, slow and obvious, sharing nothing with the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sequoia.sampling import Sampling

MASK = 2**64 - 1


def adjusted(logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """What acts before the temperature."""
    bias = dict(sampling.logit_bias)
    result = []
    for token, logit in enumerate(logits):
        value = logit + bias.get(token, 0.0)
        if token in sampling.stop_token_ids and len(answer) < sampling.min_tokens:
            value = -math.inf
        if token in prompt or token in answer:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        value -= sampling.frequency_penalty * list(answer).count(token)
        value -= sampling.presence_penalty * (token in answer)
        result.append(value)
    return result


def probabilities(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int] = (), answer: Sequence[int] = ()
) -> list[float]:
    """p of the next token, for temperatures above 0."""
    values = adjusted(logits, sampling, prompt, answer)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    top = values[order[0]]
    weights = [math.exp((value - top) / sampling.temperature) for value in values]
    order = [token for token in order if weights[token] >= sampling.min_p * weights[order[0]]]
    order = order[: sampling.top_k or None]
    total = sum(weights[token] for token in order)
    kept, mass = set(), 0.0
    for token in order:
        kept.add(token)
        mass += weights[token] / total
        if mass >= sampling.top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(values))]


def split_mix(seed: int, count: int) -> list[int]:
    """The first outputs of SplitMix64, on Python's integers."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        value = seed
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(value ^ (value >> 31))
    return outputs


def uniform(stream: int, index: int) -> float:
    """The index-th output of SplitMix64 from that state, which may be before the first, in (0, 1)."""
    state = (stream + (index - 1) * 0x9E3779B97F4A7C15) & MASK
    return ((split_mix(state, 1)[0] >> 12) + 0.5) / 2**52


def gumbel(u: float) -> float:
    """Noise of a uniform number."""
    return -math.log(-math.log(u))


def coupled(p: Sequence[float], seed: int, position: int, width: int = 256) -> tuple[int, float]:
    """The token at a position, and by how much it wins: the likeliest tokens with their noise, the others as one."""
    stream = split_mix(seed, position + 1)[-1]
    order = sorted((t for t in range(len(p)) if p[t] > 0.0), key=lambda t: (-p[t], t))
    first, others = order[:width], sorted(order[width:])
    races = [(math.log(p[t]) + gumbel(uniform(stream, t + 1)), t) for t in first]
    mass = math.fsum(p[t] for t in others)
    if others:
        races.append((math.log(mass) + gumbel(uniform(stream, 0)), -1))
    races.sort(reverse=True)
    gap = races[0][0] - races[1][0] if len(races) > 1 else math.inf
    if races[0][1] >= 0:
        return races[0][1], gap
    left = uniform(stream, -1) * mass
    for token in others:
        left -= p[token]
        if left < 0.0:
            break
    return token, gap
