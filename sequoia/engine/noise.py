"""Counter-based noise: a function of (seed, position, token id), the same in every process and on every device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_MASK = 2**64 - 1
# Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014): the constants of SplitMix64.
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
# 52 bits and a half: 53 would round the largest up to 1.
_BITS = 52
# Ids without a token: all tokens that have no noise of their own, and the draw of one of them.
OTHERS, DRAW_FROM_OTHERS = -1, -2


def noise_bits(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """The integers behind the noise, same shape as `token_ids` (int64), as int64 in two's complement.

    SplitMix64 of SplitMix64: token t gets the t-th output (from 0; -1 and -2 are those before) of a generator seeded
    with the position-th output of one seeded with `seed` (0 to 2**64 - 1). Integer arithmetic only, so the bits are
    equal on CPU and CUDA.
    """
    return _bits((token_ids + 1).mul_(_signed(_GOLDEN)).add_(_stream(seed, position)))


def uniform_noise(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Uniform on the open interval (0, 1), float64: (top 52 bits + 1/2) / 2**52."""
    return _uniform(noise_bits(seed, position, token_ids))


def gumbel_noise(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel, -log(-log(u)), float64: argmax(log p + noise) is a draw from p (Gumbel-max)."""
    return uniform_noise(seed, position, token_ids).log_().neg_().log_().neg_()


def streams(seed: int, positions: Iterable[int]) -> NDArray[np.int64]:
    """(positions,): what tells the noise of one position from that of another."""
    return np.array([_stream(seed, position) for position in positions], np.int64)


def uniform_rows(keys: Tensor, token_ids: Tensor) -> Tensor:
    """`uniform_noise` of several positions at once: `streams` as (rows, 1) by ids (tokens,) or (rows, tokens)."""
    return _uniform(_bits((token_ids + 1).mul_(_signed(_GOLDEN)) + keys))


def gumbel_rows(keys: Tensor, token_ids: Tensor) -> Tensor:
    """`gumbel_noise` of several positions at once: (rows, tokens) float64."""
    return uniform_rows(keys, token_ids).log_().neg_().log_().neg_()


def _stream(seed: int, position: int) -> int:
    return _signed(_mix(seed + (position + 1) * _GOLDEN))


def _bits(counters: Tensor) -> Tensor:
    """SplitMix64's output function, in place."""
    counters.bitwise_xor_(_shifted(counters, 30)).mul_(_signed(_FIRST))
    counters.bitwise_xor_(_shifted(counters, 27)).mul_(_signed(_SECOND))
    return counters.bitwise_xor_(_shifted(counters, 31))


def _uniform(bits: Tensor) -> Tensor:
    return _shifted(bits, 64 - _BITS).double().add_(0.5).mul_(2.0**-_BITS)


def _mix(value: int) -> int:
    """SplitMix64's output function on Python integers, modulo 2**64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's own fills with the sign."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)
