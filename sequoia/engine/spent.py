"""Where the time of a job goes: into forwards, and into the work between them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sequoia.engine.executor import Job
from sequoia.engine.whole_tree import AnyGrownTree

Result = TypeVar("Result")


@dataclass(slots=True)
class Spent:
    """Where a job's time on the engine's thread went, in seconds."""

    forwards: float = 0.0  # waiting for them included
    work: float = 0.0  # between them

    @property
    def told(self) -> dict[str, float]:
        """As attributes of a span."""
        return {"forwards_seconds": self.forwards, "work_seconds": self.work}


def timed(job: Job[Result], spent: Spent) -> Job[Result]:
    """The same job, which adds its time to `spent`."""
    answer: Tensor | AnyGrownTree | None = None
    while True:
        started = time.perf_counter()
        try:
            wanted = next(job) if answer is None else job.send(answer)
        except StopIteration as end:
            return end.value
        finally:
            waiting = time.perf_counter()
            spent.work += waiting - started
        try:
            answer = yield wanted
        finally:
            spent.forwards += time.perf_counter() - waiting
        if isinstance(answer, AnyGrownTree):
            spent.forwards -= answer.ranking_seconds
            spent.work += answer.ranking_seconds
