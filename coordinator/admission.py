"""The queue in front of the slots: who is let in, who waits, who is told to come again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from sequoia.errors import ResourceExhausted

# After which whoever is refused may try again.
RETRY_SECONDS = 1.0


class Admission:
    """Lets in as many sessions at a time as there are slots; the others wait in order of arrival.

    While no worker is there everybody is let in: sessions then wait for a worker, all for the same time.
    """

    def __init__(self, num_slots: Callable[[], int], most_waiting: int) -> None:
        self._num_slots, self._most_waiting = num_slots, most_waiting
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_inside = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """Around a session. Raises ResourceExhausted naming `queue` when too many wait already."""
        if self._waiting or not self._has_room:
            await self._wait()
        else:
            self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
            self.admit()

    def admit(self) -> None:
        """Let in those that there is room for now: the number of slots has changed."""
        while self._waiting and self._has_room:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_inside += 1
                turn.set_result(None)

    @property
    def _has_room(self) -> bool:
        num_slots = self._num_slots()
        return not num_slots or self._num_inside < num_slots

    async def _wait(self) -> None:
        if len(self._waiting) >= self._most_waiting:
            problem = f"all {self._num_slots()} slots are in use and {len(self._waiting)} requests wait; try again"
            raise ResourceExhausted(f"{problem} in {RETRY_SECONDS:g} s", "queue", retry_seconds=RETRY_SECONDS)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._num_inside -= 1
                self.admit()
            with suppress(ValueError):
                self._waiting.remove(turn)
            raise
