"""The answers to one request, as they come, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeAlias

from coordinator.gateway.asked import Asked
from sequoia.client import AsyncClient, Chunk, Generation

# The index of the choice, and the next piece of it.
Piece: TypeAlias = tuple[int, Chunk]
_Arrivals: TypeAlias = asyncio.Queue[tuple[int, Chunk | Exception | None]]


async def stream(client: AsyncClient, asked: Asked) -> AsyncGenerator[Piece]:
    """The pieces of all choices in the order in which they come. Raises SequoiaError; its end cancels all of them."""
    chunks = [client.stream(prompt, **options) for prompt, options in asked.requests]
    # Room for one: a client that reads slowly holds its answers up, not memory.
    arrivals: _Arrivals = asyncio.Queue(1)
    tasks = [asyncio.create_task(_deliver(index, each, arrivals)) for index, each in enumerate(chunks)]
    try:
        num_open = len(tasks)
        while num_open:
            index, arrived = await arrivals.get()
            if isinstance(arrived, Exception):
                raise arrived
            num_open -= arrived is None
            if arrived is not None:
                yield index, arrived
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def generate(client: AsyncClient, asked: Asked) -> Sequence[Sequence[Chunk]]:
    """All pieces of every choice."""
    found: list[list[Chunk]] = [[] for _ in asked.requests]
    async with aclosing(stream(client, asked)) as pieces:
        async for index, chunk in pieces:
            found[index].append(chunk)
    return found


def finished(chunks: Sequence[Chunk]) -> Generation:
    """The answer that they are the pieces of."""
    generation = chunks[-1].generation
    assert generation is not None, "a stream without a finish raises"
    return generation


async def _deliver(index: int, chunks: AsyncGenerator[Chunk], arrivals: _Arrivals) -> None:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                await arrivals.put((index, chunk))
        await arrivals.put((index, None))
    except Exception as error:  # noqa: BLE001 - it is raised where the pieces are awaited
        await arrivals.put((index, error))
