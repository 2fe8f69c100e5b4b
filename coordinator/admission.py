"""The queue in front of the workers: who is let in, who waits, who is told to come again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from sequoia.errors import ResourceExhausted

# After which whoever is refused may try again.
RETRY_SECONDS = 1.0


class Room(NamedTuple):
    """What workers have, or sessions take."""

    num_slots: int
    kv_tokens: int


class Admission:
    """Lets in as many sessions at a time as there are slots and KV memory for; the others wait in order of arrival.

    While no worker is there everybody is let in: sessions then wait for a worker, all for the same time.
    """

    def __init__(self, room: Callable[[], Room], most_waiting: int) -> None:
        self._room, self.most_waiting = room, most_waiting
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._taken = Room(0, 0)

    @property
    def taken(self) -> Room:
        """By those that were let in."""
        return self._taken

    @property
    def num_waiting(self) -> int:
        """Sessions that wait."""
        return len(self._waiting)

    @property
    def num_tokens_waiting(self) -> int:
        """KV memory that they wait for, in tokens. For other threads too."""
        return sum(kv_tokens for _, kv_tokens in self._waiting.copy())

    @asynccontextmanager
    async def __call__(self, kv_tokens: int) -> AsyncIterator[None]:
        """Around a session of that size. Raises ResourceExhausted naming `queue` when too many wait already."""
        if self._waiting or not self._has_room(kv_tokens):
            await self._wait(kv_tokens)
        else:
            self._take(kv_tokens)
        try:
            yield
        finally:
            self._give_back(kv_tokens)

    def admit(self) -> None:
        """Let in those that there is room for now: what workers have has changed."""
        while self._waiting and self._has_room(self._waiting[0][1]):
            turn, kv_tokens = self._waiting.popleft()
            if not turn.done():
                self._take(kv_tokens)
                turn.set_result(None)

    def _has_room(self, kv_tokens: int) -> bool:
        there, taken = self._room(), self._taken
        fits = taken.num_slots < there.num_slots and taken.kv_tokens + kv_tokens <= there.kv_tokens
        return fits or not there.num_slots

    def _take(self, kv_tokens: int) -> None:
        self._taken = Room(self._taken.num_slots + 1, self._taken.kv_tokens + kv_tokens)

    def _give_back(self, kv_tokens: int) -> None:
        self._taken = Room(self._taken.num_slots - 1, self._taken.kv_tokens - kv_tokens)
        self.admit()

    async def _wait(self, kv_tokens: int) -> None:
        if len(self._waiting) >= self.most_waiting:
            problem = f"{self._taken.num_slots} requests run and {len(self._waiting)} wait; try again"
            raise ResourceExhausted(f"{problem} in {RETRY_SECONDS:g} s", "queue", retry_seconds=RETRY_SECONDS)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, kv_tokens))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(kv_tokens)
            with suppress(ValueError):
                self._waiting.remove((turn, kv_tokens))
            self.admit()
            raise
