"""One run of a load: requests sent when they are due, at most so many at a time, and what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field

from sequoia.cli.load.timeline import Driver, Ending, Outcome, Piece, Timeline
from sequoia.cli.load.workload import LoadRequest
from sequoia.errors import SequoiaError

# After which a request goes away that is to be cancelled before its first token.
_AT_ONCE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come, in seconds from the first; one that comes when enough run waits here, and not in the server.

    `max_concurrency` None: as many as come.
    """

    due_seconds: Sequence[float]
    max_concurrency: int | None = None

    def limit(self) -> AbstractAsyncContextManager[object]:
        """To be held by a running request."""
        return asyncio.Semaphore(self.max_concurrency) if self.max_concurrency else nullcontext()


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one run, in the order in which they were due."""

    arm: str
    timelines: tuple[Timeline, ...]
    seconds: float  # from the first request to the end of the last


@dataclass(slots=True)
class Live:
    """Where a run is, for those who watch."""

    total: int
    on_change: Callable[[Live], None]
    started: float = field(default_factory=time.monotonic)
    num_ended: int = 0
    num_running: int = 0
    num_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Since the start."""
        return self.num_tokens / max(time.monotonic() - self.started, 1e-9)


async def run_load(
    driver: Driver, arm: str, requests: Sequence[LoadRequest], arrivals: Arrivals, on_change: Callable[[Live], None]
) -> Run:
    """Send them all, and wait for the last one's end."""
    live = Live(len(requests), on_change)
    limit = arrivals.limit()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request, due in zip(requests, arrivals.due_seconds, strict=True):
            await asyncio.sleep(live.started + due - time.monotonic())
            tasks.append(group.create_task(_one(driver, arm, request, limit, live)))
    return Run(arm, tuple(each.result() for each in tasks), time.monotonic() - live.started)


async def _one(
    driver: Driver, arm: str, request: LoadRequest, limit: AbstractAsyncContextManager[object], live: Live
) -> Timeline:
    async with limit:
        live.num_running += 1
        try:
            return await _followed(driver, arm, request, live)
        finally:
            live.num_running -= 1
            live.num_ended += 1
            live.on_change(live)


async def _followed(driver: Driver, arm: str, request: LoadRequest, live: Live) -> Timeline:
    seen, error = _Seen(time.monotonic()), ""
    most = request.cancel_after
    try:
        async with (
            asyncio.timeout(_AT_ONCE_SECONDS if most == 0 else None),
            aclosing(driver.ask(request, arm)) as pieces,
        ):
            async for piece in pieces:
                live.num_tokens += piece.num_tokens
                seen.add(piece)
                if most is not None and seen.num_tokens >= most:
                    break
    except TimeoutError:
        pass  # it goes away before its first token
    except SequoiaError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return seen.timeline(request, started=seen.started - live.started, error=error)


@dataclass(slots=True)
class _Seen:
    """What came of a request so far."""

    started: float
    piece_seconds: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    ending: Ending | None = None

    def add(self, piece: Piece) -> None:
        if piece.num_tokens:
            self.piece_seconds.append(time.monotonic() - self.started)
        self.texts.append(piece.text)
        self.num_tokens += piece.num_tokens
        self.ending = piece.ending

    def timeline(self, request: LoadRequest, started: float, error: str) -> Timeline:
        outcome: Outcome = "failed" if error else "done" if self.ending else "cancelled"
        return Timeline(
            request=request,
            started=started,
            piece_seconds=tuple(self.piece_seconds),
            total_seconds=time.monotonic() - self.started,
            outcome=outcome,
            num_tokens=self.ending.num_tokens if self.ending else self.num_tokens,
            text="".join(self.texts),
            ending=self.ending,
            error=error,
        )
