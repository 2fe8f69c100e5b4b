"""What the answers of two systems come to, by mode and tree: a step's time on either side, and their ratio in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sequoia.cli.benchmarks.arm_figures import Spread, spread
from sequoia.cli.benchmarks.modes import Mode, TreeWorkload, usage_of
from sequoia.cli.benchmarks.two_systems import SideAnswer
from sequoia.client import SpeculationFigures
from sequoia.topology import TreeShape


@dataclass(frozen=True)
class SideFigures:
    """One side's answers of a mode with a tree."""

    name: str
    tree: TreeShape
    answers: tuple[SideAnswer, ...]

    @cached_property
    def seconds_per_token(self) -> Spread | None:
        """After the first token, over the answers."""
        return spread(each.seconds_per_token for each in self.answers)

    @cached_property
    def draft_seconds(self) -> Spread | None:
        """Of a step, in the draft worker: over the answers, each of which is a mean over its steps."""
        return self._stage("draft")

    @cached_property
    def verify_seconds(self) -> Spread | None:
        """Of a step, in the verify worker."""
        return self._stage("verify")

    @property
    def num_ahead_hits(self) -> int:
        """Of all answers."""
        return sum(each.num_ahead_hits for each in self._figures)

    @property
    def num_ahead_attempts(self) -> int:
        """Of all answers."""
        return sum(each.num_ahead_attempts for each in self._figures)

    @property
    def num_steps(self) -> int:
        """Of all answers, plain ones included: those meant to be plain, and those for which no tree came in time."""
        return sum(each.num_steps for each in self._figures)

    @property
    def num_drafted_steps(self) -> int:
        """Those of them that verified a tree."""
        return sum(each.num_drafted_steps for each in self._figures)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; seconds of a step are None where no answer has enough of them."""
        return {
            "name": self.name,
            "seconds_per_token": _to_dict(self.seconds_per_token),
            "draft_seconds": _to_dict(self.draft_seconds),
            "verify_seconds": _to_dict(self.verify_seconds),
            "ahead_hits": self.num_ahead_hits,
            "ahead_attempts": self.num_ahead_attempts,
            "num_steps": self.num_steps,
            "num_drafted_steps": self.num_drafted_steps,
            "num_fallback_steps": sum(each.num_fallback_steps for each in self._figures),
        }

    @property
    def _figures(self) -> list[SpeculationFigures]:
        return [each.generation.speculation for each in self.answers]

    def _stage(self, name: str) -> Spread | None:
        usages = [usage_of(each, self.tree) for each in self._figures]
        return spread(getattr(each.stage_seconds, name) / each.num_steps for each in usages if each)


@dataclass(frozen=True)
class PairFigures:
    """A mode with a tree on both sides, whose answers are to the same prompts in the same order."""

    mode: Mode
    shape: str
    first: SideFigures
    second: SideFigures

    @cached_property
    def ratio(self) -> Spread | None:
        """Seconds per token of the second side by the first's, over pairs that answer one prompt."""
        pairs = [(ours.seconds_per_token, theirs.seconds_per_token) for ours, theirs in self._pairs]
        return spread(second / first for first, second in pairs if first)

    @property
    def num_pairs(self) -> int:
        """Of answers."""
        return len(self.first.answers)

    @property
    def num_equal_texts(self) -> int | None:
        """Pairs with the same tokens; None where chance differs from answer to answer."""
        if not self.mode.is_repeatable:
            return None
        return sum(ours.generation.token_ids == theirs.generation.token_ids for ours, theirs in self._pairs)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "rule": self.mode.rule,
            "temperature": self.mode.temperature,
            "shape": self.shape,
            **self.first.tree.to_dict(),
            "num_pairs": self.num_pairs,
            "num_equal_texts": self.num_equal_texts,
            "ratio": _to_dict(self.ratio),
            "sides": [self.first.to_dict(), self.second.to_dict()],
        }

    @property
    def _pairs(self) -> list[tuple[SideAnswer, SideAnswer]]:
        return list(zip(self.first.answers, self.second.answers, strict=True))


def figures_of(names: tuple[str, str], workload: TreeWorkload, answers: Sequence[SideAnswer]) -> list[PairFigures]:
    """One a mode and tree; `names` are the sides', the one to divide by first."""
    return [
        PairFigures(mode, shape, *(_side(name, mode, shape, workload.trees[shape], answers) for name in names))
        for mode, shape in workload.cells
    ]


def _side(name: str, mode: Mode, shape: str, tree: TreeShape, answers: Sequence[SideAnswer]) -> SideFigures:
    """Its answers ordered by round and prompt: they came in another order on the other side, perhaps."""
    own = [each for each in answers if (each.side, each.mode, each.shape) == (name, mode, shape)]
    return SideFigures(
        name, tree, tuple(sorted(own, key=lambda each: (each.round, each.prompt.category, each.prompt.name)))
    )


def _to_dict(found: Spread | None) -> dict[str, float] | None:
    return found._asdict() if found else None
