"""What a step consists of: the answers of every mode and tree in turn, their steps' time divided into parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

from sequoia.cli.benchmarks.arm_figures import Spread, spread
from sequoia.cli.benchmarks.modes import Mode, TreeWorkload, usage_of
from sequoia.client import Client, StageSeconds
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import TreeShape

# The parts of a step, in JSON and for people; together they are the whole of it.
PARTS: dict[str, str] = {
    "draft_forwards": "draft forwards",
    "verify_forwards": "verify forwards",
    "draft_work": "draft's logits and trees",
    "verify_work": "verifying logits",
    "overhead": "everything else",
}


@dataclass(frozen=True)
class StepFigures:
    """The steps of a mode with a tree, one usage an answer; answers with too few steps are left out."""

    mode: Mode
    shape: str
    tree: TreeShape
    usages: tuple[TreeUsage, ...]

    @cached_property
    def parts(self) -> dict[str, Spread | None]:
        """Seconds of a step by part: over the answers, each of which is a mean over its steps."""
        return {name: self._spread(attrgetter(name)) for name in PARTS}

    @cached_property
    def total(self) -> Spread | None:
        """Seconds of a step."""
        return self._spread(attrgetter("total"))

    @cached_property
    def work_share(self) -> Spread | None:
        """Work on the vocabulary and trees, of both workers, by the verify forward of the same step."""
        known = [each.stage_seconds for each in self.usages if each.stage_seconds.verify_forwards > 0.0]
        return spread(each.work / each.verify_forwards for each in known)

    @property
    def num_steps(self) -> int:
        """Of all answers."""
        return sum(each.num_steps for each in self.usages)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; seconds of a step."""
        return {
            "rule": self.mode.rule,
            "temperature": self.mode.temperature,
            "shape": self.shape,
            **self.tree.to_dict(),
            "num_answers": len(self.usages),
            "num_steps": self.num_steps,
            "seconds": {name: _to_dict(each) for name, each in {**self.parts, "total": self.total}.items()},
            "work_by_verify_forward": _to_dict(self.work_share),
        }

    def _spread(self, seconds_of: Callable[[StageSeconds], float]) -> Spread | None:
        return spread(seconds_of(each.stage_seconds) / each.num_steps for each in self.usages)


def measure(client: Client, workload: TreeWorkload, on_progress: Callable[[int, int], None]) -> list[StepFigures]:
    """All modes and trees answer a prompt one right after the other, the next of them first at each prompt.

    `on_progress` is called with (answers done, answers in all).
    """
    asking, cells = workload.asking, workload.cells
    usages: dict[tuple[Mode, str], list[TreeUsage]] = {cell: [] for cell in cells}
    workload.warm_up(client)
    for index, (_, prompt) in enumerate(asking.rounds()):
        first = index % len(cells)
        for turn, (mode, shape) in enumerate(cells[first:] + cells[:first]):
            on_progress(index * len(cells) + turn, asking.num_answers * len(cells))
            answer = workload.answer(client, mode, shape, prompt)
            usages[mode, shape] += _known([usage_of(answer.speculation, workload.trees[shape])])
    return [StepFigures(mode, shape, workload.trees[shape], tuple(usages[mode, shape])) for mode, shape in cells]


def _known(usages: Iterable[TreeUsage | None]) -> list[TreeUsage]:
    return [each for each in usages if each is not None]


def _to_dict(found: Spread | None) -> dict[str, float] | None:
    return found._asdict() if found else None
