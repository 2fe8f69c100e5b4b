"""What dynamic trees bring against planned ones of the same size, from answers to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sequoia.cli.benchmarks.asking import Asking
from sequoia.cli.benchmarks.modes import Mode, usage_of
from sequoia.client import Client, Prompt
from sequoia.errors import FailedPrecondition
from sequoia.rules import GREEDY
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import DynamicShape, Topology, TreeShape

_NUM_RESAMPLES = 2000
_NUM_WARM_UP_TOKENS = 8


class Ratio(NamedTuple):
    """Of two sums over answers, with its standard error: the pairs of answers resampled."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Duel:
    """A dynamic tree, and the planned one that it is measured against, in a mode."""

    mode: Mode
    dynamic: DynamicShape
    planned: Topology


@dataclass(frozen=True)
class DuelFigures:
    """Pairs of answers to one prompt (and one seed): the steps with the planned tree, and those with the dynamic one.

    `num_left_out`: pairs in which one of them had too few steps to tell.
    """

    duel: Duel
    pairs: tuple[tuple[TreeUsage, TreeUsage], ...]
    num_left_out: int

    @property
    def num_steps(self) -> tuple[int, int]:
        """With the planned tree, with the dynamic one."""
        planned, dynamic = self._totals[:, :, 0].sum(axis=0)
        return int(planned), int(dynamic)

    @property
    def tokens_per_step(self) -> tuple[float, float]:
        """With the planned tree, with the dynamic one: of all steps."""
        planned, dynamic = (float(tokens / steps) for steps, tokens, _ in self._totals.sum(axis=0))
        return planned, dynamic

    @cached_property
    def tokens_ratio(self) -> Ratio:
        """Tokens per step, dynamic by planned."""
        return self._ratio(lambda sums: sums[..., 1] / sums[..., 0])

    @cached_property
    def seconds_ratio(self) -> Ratio:
        """Seconds per token, dynamic by planned."""
        return self._ratio(lambda sums: sums[..., 2] / sums[..., 1])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; the planned tree's figures come first."""
        return {
            "rule": self.duel.mode.rule,
            "temperature": self.duel.mode.temperature,
            "dynamic": self.duel.dynamic.to_dict(),
            "planned": self.duel.planned.to_dict(),
            "num_pairs": len(self.pairs),
            "num_left_out": self.num_left_out,
            "num_steps": self.num_steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens_ratio": self.tokens_ratio._asdict(),
            "seconds_per_token_ratio": self.seconds_ratio._asdict(),
        }

    @cached_property
    def _totals(self) -> NDArray[np.float64]:
        """(pairs, 2, 3): steps, tokens, seconds; of the planned tree and of the dynamic one."""
        rows = [[(each.num_steps, each.num_tokens, each.stage_seconds.total) for each in pair] for pair in self.pairs]
        return np.array(rows, np.float64)

    def _ratio(self, of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Ratio:
        generator, num_pairs = np.random.default_rng(0), len(self.pairs)
        picks = generator.integers(num_pairs, size=(_NUM_RESAMPLES, num_pairs))
        planned, dynamic = np.moveaxis(of(self._totals[picks].sum(axis=1)), -1, 0)
        all_planned, all_dynamic = of(self._totals.sum(axis=0))
        return Ratio(float(all_dynamic / all_planned), float(np.std(dynamic / planned)))


def measure(
    client: Client, duel: Duel, asking: Asking, least_steps: int, on_progress: Callable[[int, int], None]
) -> DuelFigures:
    """Both trees answer each prompt, the other one first at the next, until each had `least_steps` steps.

    Every round over the prompts has a seed of its own. Greedy answers are the same in every round, so there is one.
    Raises FailedPrecondition where no answer has enough steps with a tree.
    """
    pairs: list[tuple[TreeUsage, TreeUsage]] = []
    num_left_out = 0
    _pair(client, duel, asking.form(asking.prompts[0]), _NUM_WARM_UP_TOKENS, 0, 1)
    for number in range(1) if duel.mode.rule == GREEDY.name else count():
        for prompt in asking.prompts:
            done = _num_steps(pairs)
            on_progress(min(done, least_steps), least_steps)
            if done >= least_steps:
                return DuelFigures(duel, tuple(pairs), num_left_out)
            order = -1 if (len(pairs) + num_left_out) % 2 else 1
            pair = _pair(client, duel, asking.form(prompt), asking.max_tokens, number, order)
            num_left_out += pair is None
            pairs += [pair] if pair else []
        if not pairs:
            raise FailedPrecondition("no answer has enough steps with a tree; is there a draft worker?", "draft")
    return DuelFigures(duel, tuple(pairs), num_left_out)


def _pair(
    client: Client, duel: Duel, prompt: Prompt, max_tokens: int, seed: int, order: int
) -> tuple[TreeUsage, TreeUsage] | None:
    """What each tree did in its answer, the planned one first, whichever answered first; None: too little to tell."""
    shapes: list[TreeShape] = [duel.planned, duel.dynamic]
    found = {
        shape: usage_of(duel.mode.ask(client, prompt, shape, max_tokens, seed).speculation, shape)
        for shape in shapes[::order]
    }
    planned, dynamic = found[duel.planned], found[duel.dynamic]
    return (planned, dynamic) if planned and dynamic else None


def _num_steps(pairs: Sequence[tuple[TreeUsage, TreeUsage]]) -> int:
    """Of the tree that had fewer."""
    return min(sum(each[side].num_steps for each in pairs) for side in (0, 1))
