"""Tasks that run beside the requests, and their end."""

from __future__ import annotations

import asyncio

_AGAIN_SECONDS = 0.1


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel the tasks and wait until they have ended.

    Again and again: a cancellation that meets a reply from Redis can be lost (redis 8.1, a plain `mget` in a loop).
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_AGAIN_SECONDS)
