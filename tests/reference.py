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


def gumbel(seed: int, position: int, vocabulary: int) -> list[float]:
    """The noise at a position."""
    stream = split_mix(seed, position + 1)[-1]
    uniforms = [((bits >> 12) + 0.5) / 2**52 for bits in split_mix(stream, vocabulary)]
    return [-math.log(-math.log(u)) for u in uniforms]


def coupled(p: Sequence[float], seed: int, position: int) -> tuple[int, float]:
    """argmax(log p + noise), and by how much it wins."""
    noise = gumbel(seed, position, len(p))
    races = sorted(((math.log(p[t]) + noise[t], -t) for t in range(len(p)) if p[t] > 0.0), reverse=True)
    return -races[0][1], races[0][0] - races[1][0] if len(races) > 1 else math.inf
