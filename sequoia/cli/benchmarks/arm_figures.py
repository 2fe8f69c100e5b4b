"""What the answers of all arms come to: time per token, its ratio to plain decoding, whether the text is the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sequoia.cli.benchmarks.arm_measuring import OFF, Sample
from sequoia.client import StageSeconds

_STEP_STAGES = ("draft", "verify", "network", "host")


class Spread(NamedTuple):
    """The quartiles of some values."""

    low: float
    median: float
    high: float


class Difference(NamedTuple):
    """Where an answer leaves that of plain decoding: the first token, counted from 0, that is another one."""

    category: str
    prompt: str
    position: int


class Worst(NamedTuple):
    """The category in which an arm is slowest against plain decoding, and its ratio there."""

    category: str
    ratio_to_off: float


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """One arm on the prompts of a category, or on all. None where there was nothing to take it from."""

    num_answers: int
    num_tokens: int
    seconds_per_token: Spread | None  # after the first token
    first_token_seconds: Spread | None
    tokens_per_second: Spread | None  # from end to end
    ratio_to_off: Spread | None  # speed after the first token, by plain decoding's on the same prompt beside it
    tokens_per_step: float | None
    stage_shares: dict[str, float] | None  # of the steps' wall time

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value._asdict() if isinstance(value, Spread) else value for name, value in found.items()}


@dataclass(frozen=True)
class ArmFigures:
    """One arm's samples, and plain decoding's of the same prompts and rounds."""

    samples: tuple[Sample, ...]
    off_samples: tuple[Sample, ...]
    eos_token_ids: frozenset[int]

    @property
    def name(self) -> str:
        """The arm's."""
        return self.samples[0].arm

    @cached_property
    def overall(self) -> GroupFigures:
        """On all prompts."""
        return self._group(self.samples)

    @cached_property
    def by_category(self) -> dict[str, GroupFigures]:
        """In the order in which the categories were first met."""
        categories = dict.fromkeys(each.prompt.category for each in self.samples)
        return {
            name: self._group([each for each in self.samples if each.prompt.category == name]) for name in categories
        }

    @property
    def worst_category(self) -> Worst | None:
        """By the median ratio; None when no category has one."""
        ratios = {name: each.ratio_to_off for name, each in self.by_category.items()}
        known = [Worst(name, ratio.median) for name, ratio in ratios.items() if ratio]
        return min(known, key=lambda each: each.ratio_to_off, default=None)

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """From plain decoding, one a prompt at most: the earliest of its rounds."""
        off = {each.key: each.answer.token_ids for each in self.off_samples}
        found: dict[tuple[str, str], Difference] = {}
        for each in self.samples:
            position = first_difference(each.answer.token_ids, off[each.key], self.eos_token_ids)
            if position is not None:
                difference = Difference(each.prompt.category, each.prompt.name, position)
                found[each.key[:2]] = min(found.get(each.key[:2], difference), difference)
        return tuple(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        worst = self.worst_category
        return {
            "name": self.name,
            "overall": self.overall.to_dict(),
            "by_category": {name: each.to_dict() for name, each in self.by_category.items()},
            "worst_category": worst._asdict() if worst else None,
            "num_prompts_that_differ": len(self.differences),
            "differences": [each._asdict() for each in self.differences],
        }

    def _group(self, samples: Sequence[Sample]) -> GroupFigures:
        answers = [each.answer for each in samples]
        return GroupFigures(
            num_answers=len(answers),
            num_tokens=sum(len(each.token_ids) for each in answers),
            seconds_per_token=spread(each.seconds_per_token for each in answers),
            first_token_seconds=spread(each.first_token_seconds for each in answers),
            tokens_per_second=spread(each.tokens_per_second for each in answers),
            ratio_to_off=spread(self._ratios(samples)),
            tokens_per_step=_tokens_per_step(samples),
            stage_shares=_stage_shares([each.stage_seconds for each in answers if each.stage_seconds]),
        )

    def _ratios(self, samples: Sequence[Sample]) -> list[float | None]:
        off = {each.key: each.answer.seconds_per_token for each in self.off_samples}
        pairs = [(off[each.key], each.answer.seconds_per_token) for each in samples]
        return [plain / own if plain and own else None for plain, own in pairs]


def figures_of(samples: Sequence[Sample], eos_token_ids: frozenset[int] = frozenset()) -> list[ArmFigures]:
    """One an arm, plain decoding first."""
    by_arm: dict[str, list[Sample]] = {OFF: []}
    for each in samples:
        by_arm.setdefault(each.arm, []).append(each)
    off = tuple(by_arm[OFF])
    return [ArmFigures(tuple(each), off, eos_token_ids) for each in by_arm.values()]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of those that are known; quartiles between two values are interpolated."""
    known = [each for each in values if each is not None]
    return Spread(*np.percentile(known, [25, 50, 75]).tolist()) if known else None


def first_difference(tokens: Sequence[int], others: Sequence[int], eos_token_ids: frozenset[int]) -> int | None:
    """The first position at which they are not the same, if any. The token that ends a text may be missing."""
    ours, theirs = _content(tokens, eos_token_ids), _content(others, eos_token_ids)
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, (our, their) in enumerate(pairs) if our != their), min(len(ours), len(theirs)))


def _content(tokens: Sequence[int], eos_token_ids: frozenset[int]) -> tuple[int, ...]:
    return tuple(tokens[:-1] if tokens and tokens[-1] in eos_token_ids else tokens)


def _tokens_per_step(samples: Sequence[Sample]) -> float | None:
    counts = [(each.answer.num_step_tokens or 0, each.answer.num_steps or 0) for each in samples]
    num_steps = sum(steps for _, steps in counts)
    return sum(tokens for tokens, _ in counts) / num_steps if num_steps else None


def _stage_shares(stages: Sequence[StageSeconds]) -> dict[str, float] | None:
    sums = {name: sum(getattr(each, name) for each in stages) for name in _STEP_STAGES}
    total = sum(sums.values())
    return {name: seconds / total for name, seconds in sums.items()} if total else None
