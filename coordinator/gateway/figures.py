"""The `sequoia` object beside what the API has: what speculation did for a choice, and who wrote what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.gateway.asked import Asked
from sequoia.client import Chunk, Generation
from sequoia.origins import Origins

Json = dict[str, Any]
# What the API has a place for.
_TOLD_ELSEWHERE = ("text", "token_ids", "finish_reason", "logprobs")


class Extras:
    """Of one choice, chunk by chunk. Each is a dict to be merged into the choice; empty where there is nothing."""

    def __init__(self, asked: Asked) -> None:
        self._origins = Origins() if asked.shows_speculation else None

    @property
    def tell_every_chunk(self) -> bool:
        """Whether a chunk without text is of interest too: it is a step."""
        return self._origins is not None

    def piece(self, chunk: Chunk, *, with_figures: bool = False) -> Json:
        """Of one chunk: who wrote its text, where that is wanted, and the figures, where they are."""
        told = self._pieces([chunk])
        if with_figures and chunk.generation is not None:
            told |= figures(chunk.generation)
        return {"sequoia": told} if told else {}

    def whole(self, chunks: Sequence[Chunk], generation: Generation) -> Json:
        """Of all chunks together."""
        return {"sequoia": self._pieces(chunks) | figures(generation)}

    def _pieces(self, chunks: Sequence[Chunk]) -> Json:
        if self._origins is None:
            return {}
        num_before = self._origins.num_drafted
        pieces = [piece for chunk in chunks for piece in self._origins.push(chunk)]
        return {
            "num_tokens": sum(len(each.token_ids) for each in chunks),
            "num_drafted_tokens": self._origins.num_drafted - num_before,
            "pieces": [{"text": text, "from": "draft" if is_drafted else "target"} for text, is_drafted in pieces],
        }


def figures(generation: Generation) -> Json:
    """Rule, seed, times, and what speculation did."""
    return {name: value for name, value in generation.to_dict().items() if name not in _TOLD_ELSEWHERE}
