"""Predicted against replayed: what shapes were expected to bring on texts that the expectation never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from sequoia.cli.benchmarks.candidates import MAX_LEVELS, PLANNER, models, shapes
from sequoia.cli.benchmarks.replay import Ranks, whole_steps
from sequoia.cli.benchmarks.traces import Trace
from sequoia.errors import InvalidArgument
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import expected_tokens
from sequoia.planner import PlanInputs, choose, price
from sequoia.pricing import planned_like
from sequoia.topology import Topology

CHOICE = "planner's choice"
# Steps that follow each other are alike: they are drawn again together.
_BLOCK_STEPS = 8
_NUM_RESAMPLES = 2000


class Curves(NamedTuple):
    """Seconds of a forward of the target and of the draft by its width."""

    verify: LatencyCurve
    draft: LatencyCurve


@dataclass(frozen=True, slots=True)
class Fold:
    """One shape on one text, predicted from the other texts."""

    topology: Topology
    expected: dict[str, float]  # tokens per step, by model of acceptance
    lengths: tuple[int, ...]  # tokens of each step
    step_seconds: float | None  # without round trips; None without curves, or when they end before this tree

    @property
    def num_steps(self) -> int:
        """Replayed."""
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """One shape over all texts, each predicted from the others. An optimal tree may differ between them."""

    name: str
    folds: tuple[Fold, ...]

    @property
    def realised(self) -> float:
        """Tokens per step, replayed."""
        return self._num_tokens / self.num_steps

    @property
    def num_steps(self) -> int:
        """Replayed."""
        return sum(fold.num_steps for fold in self.folds)

    @property
    def interval(self) -> tuple[float, float]:
        """Of `realised`, 95 %: the bootstrap over blocks of steps that follow each other. Always the same."""
        texts = [fold.lengths for fold in self.folds]
        blocks = [text[at : at + _BLOCK_STEPS] for text in texts for at in range(0, len(text), _BLOCK_STEPS)]
        sums = np.array([(sum(block), len(block)) for block in blocks])
        drawn = np.random.default_rng(0).integers(0, len(blocks), (_NUM_RESAMPLES, len(blocks)))
        tokens, steps = sums[drawn].sum(axis=1).T
        low, high = np.quantile(tokens / steps, (0.025, 0.975)).tolist()
        return low, high

    @property
    def predicted(self) -> dict[str, float]:
        """Tokens per step by model of acceptance: those expected of the steps that were replayed."""
        return {model: self._expected_tokens(model) / self.num_steps for model in self.folds[0].expected}

    @property
    def errors(self) -> dict[str, float]:
        """`predicted` by `realised`, less 1."""
        return {model: tokens / self.realised - 1.0 for model, tokens in self.predicted.items()}

    @property
    def predicted_seconds(self) -> float | None:
        """Per token, by the planner's model."""
        return None if self._seconds is None else self._seconds / self._expected_tokens(PLANNER)

    @property
    def replayed_seconds(self) -> float | None:
        """Per token, by the same cost of a step."""
        return None if self._seconds is None else self._seconds / self._num_tokens

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "shape": self.name,
            "parents": [list(fold.topology.parents) for fold in self.folds],
            "num_steps": self.num_steps,
            "tokens_per_step": self.realised,
            "interval": list(self.interval),
            "predicted": self.predicted,
            "errors": self.errors,
            "predicted_seconds_per_token": self.predicted_seconds,
            "replayed_seconds_per_token": self.replayed_seconds,
        }

    @property
    def _num_tokens(self) -> int:
        return sum(sum(fold.lengths) for fold in self.folds)

    def _expected_tokens(self, model: str) -> float:
        return sum(fold.num_steps * fold.expected[model] for fold in self.folds)

    @property
    def _seconds(self) -> float | None:
        seconds = [fold.step_seconds for fold in self.folds]
        if any(each is None for each in seconds):
            return None
        return sum(fold.num_steps * (fold.step_seconds or 0.0) for fold in self.folds)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All shapes at one temperature."""

    temperature: float
    num_tokens: int
    shapes: tuple[ShapeResult, ...]

    @property
    def mean_errors(self) -> dict[str, float]:
        """Absolute, by model of acceptance, over the shapes that speculate."""
        drafted = [each.errors for each in self.shapes if each.folds[0].topology.size > 1]
        return {model: mean(abs(errors[model]) for errors in drafted) for model in drafted[0]}

    @property
    def choice_place(self) -> int | None:
        """Of the planner's choice among all shapes by replayed seconds per token, from 1; None without curves."""
        seconds = {each.name: each.replayed_seconds for each in self.shapes}
        if (chosen := seconds.pop(CHOICE, None)) is None:
            return None
        return 1 + sum(each is not None and each < chosen for each in seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "temperature": self.temperature,
            "num_tokens": self.num_tokens,
            "mean_absolute_errors": self.mean_errors,
            "place_of_planners_choice": self.choice_place,
            "shapes": [each.to_dict() for each in self.shapes],
        }


def evaluate(trace: Trace, curves: Curves | None) -> Evaluation:
    """Every shape on every text, predicted from the others.

    Raises InvalidArgument naming `tokens` unless two texts are as long as the deepest tree.
    """
    texts = [text.ranks for text in trace.texts if len(text.ranks) >= MAX_LEVELS]
    if len(texts) < 2:
        reason = f"the texts of temperature {trace.temperature:g} end too early"
        raise InvalidArgument(f"{reason}: two must have more than {MAX_LEVELS} tokens", "tokens")
    folds = [_fold([*texts[:at], *texts[at + 1 :]], texts[at], curves) for at in range(len(texts))]
    results = (ShapeResult(name, tuple(fold[name] for fold in folds)) for name in folds[0])
    return Evaluation(trace.temperature, trace.num_tokens, tuple(results))


def _fold(known: Sequence[Ranks], unseen: Ranks, curves: Curves | None) -> dict[str, Fold]:
    acceptance = models(known)
    inputs = PlanInputs(acceptance[PLANNER], curves.verify, curves.draft) if curves else None
    candidates = shapes(acceptance[PLANNER])
    if inputs:
        candidates[CHOICE] = planned_like(choose(inputs, max_levels=MAX_LEVELS).chosen.shape, inputs)
    return {
        name: Fold(
            topology,
            {model: expected_tokens(topology, rows) for model, rows in acceptance.items()},
            tuple(step.num_tokens for step in whole_steps(topology, unseen, MAX_LEVELS)),
            _step_seconds(topology, inputs) if inputs else None,
        )
        for name, topology in candidates.items()
    }


def _step_seconds(topology: Topology, inputs: PlanInputs) -> float | None:
    try:
        priced = price(topology, inputs)
    except ValueError:
        return None  # wider than the curves were measured
    return priced.seconds_per_token * priced.tokens_per_step
