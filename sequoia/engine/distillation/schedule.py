"""How long and how fast a student learns. Loads no torch: a command line speaks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

_WARMUP_SHARE, _LAST_SHARE = 0.03, 0.03


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of `batch_tokens` padded tokens: a short warm-up, then a cosine down to 3 % of `learning_rate`."""

    num_steps: int
    batch_tokens: int
    learning_rate: float
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of the step with that number, from 0."""
        warmup = max(1.0, _WARMUP_SHARE * self.num_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.num_steps))
        return self.learning_rate * min(1.0, (step + 1) / warmup) * (_LAST_SHARE + (1.0 - _LAST_SHARE) * cosine)
