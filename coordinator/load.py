"""How many sessions run at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Clients that ask again and again have no request here for a moment, often all of them at once. Their next ones would
# be taken for few, and each have a draft read its prompt that waits for the others ever after.
_LOOK_BACK_SECONDS = 0.25


class Load:
    """Counts sessions; `count` is the most that ran at a time a moment ago or run now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._running = clock, 0
        # (until when it counts, sessions before one ended): each later one is of fewer.
        self._before: deque[tuple[float, int]] = deque()

    @property
    def count(self) -> int:
        """A session that ended a moment ago is taken to come back; one that follows another is one, not two."""
        while self._before and self._before[0][0] <= self._clock():
            self._before.popleft()
        return max(self._running, self._before[0][1] if self._before else 0)

    def begin(self) -> None:
        """A session."""
        self._running += 1

    def end(self) -> None:
        """A session."""
        while self._before and self._before[-1][1] <= self._running:
            self._before.pop()
        self._before.append((self._clock() + _LOOK_BACK_SECONDS, self._running))
        self._running -= 1
