"""What steps of one kind take for a token, lately, and how sure that is."""

from __future__ import annotations

import math

# Steps after which an observation counts half, of one session.
_HALF_LIFE_STEPS = 256
# A pace is known after so many steps, of one session.
_KNOWN_STEPS = 8


class Pace:
    """Seconds per token of one tree, from its steps; older ones count less.

    Of sessions that run at the same time so many steps more are wanted: what disturbs one forward disturbs them all.
    """

    def __init__(self, num_sessions: int = 1) -> None:
        self._num_sessions = num_sessions
        self.num_steps = self.num_tokens = self.seconds = 0.0
        self._squares = self._tokens_squared = self._products = self._seconds_squared = 0.0
        self.observed = 0

    def add(self, seconds: float, num_tokens: int) -> None:
        """One step."""
        keep = 0.5 ** (1 / (_HALF_LIFE_STEPS * self._num_sessions))
        self.num_steps = keep * self.num_steps + 1.0
        self._squares = keep * keep * self._squares + 1.0
        self.num_tokens = keep * self.num_tokens + num_tokens
        self.seconds = keep * self.seconds + seconds
        self._tokens_squared = keep * self._tokens_squared + num_tokens**2
        self._products = keep * self._products + num_tokens * seconds
        self._seconds_squared = keep * self._seconds_squared + seconds**2
        self.observed += 1

    def scale(self, factor: float) -> None:
        """Take it that everything took so many times as long."""
        self.seconds *= factor
        self._products *= factor
        self._seconds_squared *= factor**2

    @property
    def is_known(self) -> bool:
        """Whether it was observed often enough to be compared."""
        return self.observed >= _KNOWN_STEPS * self._num_sessions

    @property
    def seconds_per_step(self) -> float:
        """On average."""
        return self.seconds / self.num_steps

    @property
    def seconds_per_token(self) -> float:
        """The ratio of the sums."""
        return self.seconds / self.num_tokens

    @property
    def standard_error(self) -> float:
        """Of `seconds_per_token`: of a ratio of means, as for independent steps."""
        pace = self.seconds_per_token
        spread = self._seconds_squared - 2.0 * pace * self._products + pace**2 * self._tokens_squared
        num_effective = self.num_steps**2 / self._squares
        return math.sqrt(max(spread, 0.0) / self.num_steps / num_effective) / (self.num_tokens / self.num_steps)
