"""One choice of a reply, in the API's two shapes, as it comes and as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from coordinator.gateway.answering import finished
from coordinator.gateway.asked import Asked
from coordinator.gateway.figures import Extras, figures
from coordinator.gateway.logprobs import CompletionLogprobs, chat_logprobs
from sequoia.client import Chunk

Json = dict[str, Any]


class Choice(Protocol):
    """Takes the chunks of one answer."""

    def opening(self) -> Iterator[Json]:
        """What a stream says of it before its first chunk."""

    def pieces(self, chunk: Chunk) -> Iterator[Json]:
        """What a stream says of it on that chunk."""

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """What a reply that is no stream says of it."""


class ChatChoice:
    """Of a chat."""

    def __init__(self, asked: Asked, index: int) -> None:
        self._asked, self._index, self._extras = asked, index, Extras(asked)

    def opening(self) -> Iterator[Json]:
        """The assistant takes the floor."""
        yield self._choice(delta={"role": "assistant", "content": ""})

    def pieces(self, chunk: Chunk) -> Iterator[Json]:
        """Its text, and in the end why it ends."""
        logprobs = chat_logprobs(chunk.logprobs) if self._asked.tells_logprobs else None
        if chunk.text or logprobs or self._extras.tell_every_chunk:
            delta = {"content": chunk.text} if chunk.text else {}
            yield self._choice(delta=delta, logprobs=logprobs, **self._extras.piece(chunk))
        if (generation := chunk.generation) is not None:
            yield self._choice(delta={}, finish_reason=generation.finish_reason, sequoia=figures(generation))

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """With its message."""
        generation = finished(chunks)
        return self._choice(
            message={"role": "assistant", "content": generation.text, "refusal": None},
            finish_reason=generation.finish_reason,
            logprobs=chat_logprobs(generation.logprobs) if self._asked.tells_logprobs else None,
            **self._extras.whole(chunks, generation),
        )

    def _choice(self, **parts: Any) -> Json:
        return {"index": self._index, "logprobs": None, "finish_reason": None, **parts}


class CompletionChoice:
    """Of a completion. `echo` is what stands before its text."""

    def __init__(self, asked: Asked, index: int, echo: str) -> None:
        self._index, self._echo, self._extras = index, echo, Extras(asked)
        self._logprobs = CompletionLogprobs() if asked.tells_logprobs else None

    def opening(self) -> Iterator[Json]:
        """The prompt, where it is wanted."""
        if self._echo:
            yield self._choice(self._echo)

    def pieces(self, chunk: Chunk) -> Iterator[Json]:
        """Its text, and in the end why it ends."""
        logprobs = self._logprobs.push(chunk.logprobs) if self._logprobs else None
        reason = chunk.generation.finish_reason if chunk.generation is not None else None
        if chunk.text or logprobs or reason or self._extras.tell_every_chunk:
            extras = self._extras.piece(chunk, with_figures=True)
            yield self._choice(chunk.text, finish_reason=reason, logprobs=logprobs, **extras)

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """With its text."""
        generation = finished(chunks)
        return self._choice(
            self._echo + generation.text,
            finish_reason=generation.finish_reason,
            logprobs=self._logprobs.push(generation.logprobs) if self._logprobs else None,
            **self._extras.whole(chunks, generation),
        )

    def _choice(self, text: str, **parts: Any) -> Json:
        return {"index": self._index, "text": text, "logprobs": None, "finish_reason": None, **parts}
