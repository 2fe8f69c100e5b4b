"""What a selfcheck finds: the target's law, samples of the rules beside it, texts that must not differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sequoia.errors import Internal

Tokens: TypeAlias = tuple[int, ...]

OFF = "off"

_NUM_SIMULATIONS = 10_000
_FALSE_ALARM = 1e-3


@dataclass(frozen=True, slots=True)
class Law:
    """The probabilities of the first three tokens after `prompt`. Raises Internal when they do not sum to 1.

    `at_stake`: the beginnings after which the last token that top_k keeps and the first that it cuts are nearly tied,
    and the probability that moves when rounding swaps the two. `rounding`: what it moves besides, in total variation.
    """

    prompt: Tokens
    p: Mapping[Tokens, float]
    at_stake: Mapping[Tokens, float]
    rounding: float

    def __post_init__(self) -> None:
        if abs(sum(self.p.values()) - 1.0) > 1e-6:
            raise Internal(f"the target's probabilities sum to {sum(self.p.values()):.7f}, not to 1")

    @property
    def allowance(self) -> float:
        """The total variation that rounding explains."""
        return sum(self.at_stake.values()) + self.rounding

    def excludes(self, tokens: Tokens) -> bool:
        """Whether `tokens` are impossible, near ties aside."""
        return tokens not in self.p and not any(tokens[:length] in self.at_stake for length in range(len(tokens)))


@dataclass(frozen=True, slots=True)
class Reference:
    """Total variation distances of samples of a law from that very law: their mean, and the most to be accepted."""

    expected: float
    limit: float


@dataclass(frozen=True, slots=True)
class Drafting:
    """In how many answers a step was drafted, and why one was not the last time."""

    num_answers: int
    num_drafted: int
    fallback_reason: str

    @property
    def suffices(self) -> bool:
        """Whether the answers tell of speculation."""
        return 2 * self.num_drafted >= self.num_answers


@dataclass(frozen=True, slots=True)
class LawCheck:
    """How far the samples of a rule are from the target's law. `num_outside` of them are impossible by that law."""

    rule: str
    total_variation: float
    reference: Reference
    num_outside: int
    drafting: Drafting

    @property
    def verdict(self) -> str:
        """`exact`, `BIASED`, or `not checked` because too little was drafted."""
        if self.total_variation > self.reference.limit or self.num_outside:
            return "BIASED"
        return "exact" if self.rule == OFF or self.drafting.suffices else "not checked"

    @property
    def passed(self) -> bool:
        """Whether the samples give no reason for doubt."""
        return self.verdict == "exact"


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a text leaves the one without speculation.

    `gap`: between the raw logprobs of the two likeliest tokens there; None where these do not decide.
    """

    prompt: int  # index in PROMPTS
    shape: str  # key in SHAPES
    num_same_tokens: int
    gap: float | None


@dataclass(frozen=True, slots=True)
class IdentityCheck:
    """Which texts of a rule differ from those without speculation, in a target of `dtype`."""

    rule: str
    dtype: str
    differences: tuple[Difference, ...]
    drafting: Drafting

    @property
    def verdict(self) -> str:
        """`same`, `near tie` (rounding explains the differences), `DIFFERENT`, or `not checked`."""
        if not self.differences:
            return "same" if self.drafting.suffices else "not checked"
        is_near = all(each.gap is not None and each.gap < near_tie(self.dtype) for each in self.differences)
        return "near tie" if is_near or has_16_bits(self.dtype) else "DIFFERENT"

    @property
    def passed(self) -> bool:
        """Whether all texts are the same, near ties aside."""
        return self.verdict in ("same", "near tie")


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """All checks of a pair."""

    target: str
    draft: str
    dtype: str
    temperature: float
    laws: tuple[LawCheck, ...]
    identities: tuple[IdentityCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(each.passed for each in self.laws) and all(each.passed for each in self.identities)


def simulate(law: Law, num_samples: int) -> Reference:
    """What so many samples of the law itself would show. A false alarm at the limit has probability 1e-3.

    The limit includes the law's allowance for rounding.
    """
    p = np.array(list(law.p.values()))
    counts = np.random.default_rng(0).multinomial(num_samples, p / p.sum(), size=_NUM_SIMULATIONS)
    distances = np.abs(counts / num_samples - p).sum(axis=1) / 2
    limit = np.quantile(distances, 1 - _FALSE_ALARM, method="higher")
    return Reference(float(distances.mean()), float(limit) + law.allowance)


def check_law(rule: str, samples: Counter[Tokens], law: Law, reference: Reference, drafting: Drafting) -> LawCheck:
    """Compare how often each tokens came with their law."""
    cells = law.p.keys() | samples.keys()
    distance = sum(abs(samples[each] / samples.total() - law.p.get(each, 0.0)) for each in cells) / 2
    num_outside = sum(count for tokens, count in samples.items() if law.excludes(tokens))
    return LawCheck(rule, distance, reference, num_outside, drafting)


def has_16_bits(dtype: str) -> bool:
    """Whether logits are so coarse that near ties are common."""
    return dtype in ("bfloat16", "float16")


def near_tie(dtype: str) -> float:
    """Logits less than this apart may change places by rounding. bfloat16 has steps of 0.125 between 16 and 32."""
    return 0.25 if has_16_bits(dtype) else 1e-3
