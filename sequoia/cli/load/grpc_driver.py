"""Asks a coordinator under load, as the SDK does."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sequoia.cli.load.timeline import Ending, Piece
from sequoia.cli.load.workload import Form, LoadRequest
from sequoia.cli.rule_timing import worker_to_dict
from sequoia.client import AsyncClient, Message


class GrpcDriver:
    """Over one connection to a coordinator."""

    def __init__(self, client: AsyncClient, form: Form) -> None:
        self._client, self._form = client, form

    async def ask(self, request: LoadRequest, arm: str) -> AsyncGenerator[Piece]:
        """As Driver has it."""
        text = request.prompt.text
        chunks = self._client.stream(
            text if self._form.is_raw else [Message("user", text)],
            max_tokens=request.max_tokens,
            temperature=self._form.temperature,
            seed=request.seed if self._form.temperature else None,
            ignore_eos=self._form.ignore_eos,
            speculation="off" if arm == "off" else "auto",
        )
        try:
            async for chunk in chunks:
                ending = None
                if (generation := chunk.generation) is not None:
                    figures = generation.speculation
                    ending = Ending(len(generation.token_ids), figures.num_steps, figures.num_accepted_tokens)
                if chunk.token_ids or ending:
                    yield Piece(chunk.text, len(chunk.token_ids), ending)
        finally:
            await chunks.aclose()


async def describe(client: AsyncClient) -> dict[str, Any]:
    """The pair that serves, ready for JSON."""
    pair = await client.describe_pair()
    draft = worker_to_dict(pair.draft) if pair.HasField("draft") else None
    return {"backend": "grpc", "target": worker_to_dict(pair.verify), "draft": draft}
