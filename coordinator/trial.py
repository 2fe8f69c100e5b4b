"""A trial of a gait: some steps of it, compared with those of the gait gone in right before and right after."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from coordinator.gaits import Gait

# Steps of a session before a trial, and after it, that it is compared with.
_COMPARED_STEPS = 4
# A trial tells nothing when these differ by so much: it was the machine that changed.
_MOST_CHANGE = 1.3


class Recent:
    """What the last usual steps of the gait gone in took, in seconds; of all sessions."""

    def __init__(self, num_sessions: int) -> None:
        self._seconds: deque[float] = deque(maxlen=_COMPARED_STEPS * num_sessions)

    def add(self, seconds: float) -> None:
        """One step."""
        self._seconds.append(seconds)

    def clear(self) -> None:
        """From here on."""
        self._seconds.clear()

    @property
    def is_full(self) -> bool:
        """Whether there are as many as are compared."""
        return len(self._seconds) == self._seconds.maxlen

    @property
    def step_seconds(self) -> float | None:
        """The mean, if there is any."""
        return fmean(self._seconds) if self._seconds else None


@dataclass(slots=True)
class Trial:
    """Of a gait; over when it has had its steps, or has waited in vain."""

    gait: Gait
    num_steps_left: int
    num_unsettled: int  # first steps that do not count: other sessions have yet to change over
    num_waits_left: int  # steps that waited for the draft, before it is given up
    before: float | None  # seconds of a step of the gait gone in
    steps: list[tuple[float, int]] = field(default_factory=list)  # (seconds, tokens)

    @property
    def is_over(self) -> bool:
        """Whether the gait gone in goes on."""
        return self.num_steps_left == 0 or self.num_waits_left == 0

    def add(self, seconds: float, num_tokens: int, *, usual: bool) -> None:
        """A step of it."""
        if self.num_unsettled:
            self.num_unsettled -= 1
        elif usual:
            self.num_steps_left -= 1
            self.steps.append((seconds, num_tokens))
        else:
            self.num_waits_left -= 1

    def machine_speed(self, after: float) -> float | None:
        """Seconds of a step of the gait gone in at the time of the trial; None when that was not one time."""
        if not self.before:
            return after
        changed = max(self.before, after) / min(self.before, after) > _MOST_CHANGE
        return None if changed else (self.before + after) / 2.0
