"""One choice of a reply, in the API's two shapes, as it comes and as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from coordinator.gateway.answering import finished
from coordinator.gateway.asked import Asked
from coordinator.gateway.calls import Arguments, Begun, Part, reader_of
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
        self._reader = reader_of(asked.tool_use)

    def opening(self) -> Iterator[Json]:
        """The assistant takes the floor."""
        use = self._asked.tool_use
        yield self._choice(delta={"role": "assistant", "content": None if use is not None and use.is_forced else ""})

    def pieces(self, chunk: Chunk) -> Iterator[Json]:
        """Its text and its calls, and in the end why it ends."""
        logprobs = chat_logprobs(chunk.logprobs) if self._asked.tells_logprobs else None
        deltas = [_delta(each) for each in self._parts(chunk.text, is_last=chunk.generation is not None)]
        if deltas or logprobs or self._extras.tell_every_chunk:
            # What is told of the chunk's tokens comes with the first of what they make.
            first, *others = deltas or [{}]
            yield self._choice(delta=first, logprobs=logprobs, **self._extras.piece(chunk))
            yield from (self._choice(delta=each) for each in others)
        if (generation := chunk.generation) is not None:
            reason = self._reader.finish_reason(generation.finish_reason)
            yield self._choice(delta={}, finish_reason=reason, sequoia=figures(generation))

    def whole(self, chunks: Sequence[Chunk]) -> Json:
        """With its message."""
        generation = finished(chunks)
        message = _message(self._parts(generation.text, is_last=True))
        return self._choice(
            message=message,
            finish_reason=self._reader.finish_reason(generation.finish_reason),
            logprobs=chat_logprobs(generation.logprobs) if self._asked.tells_logprobs else None,
            **self._extras.whole(chunks, generation),
        )

    def _parts(self, text: str, *, is_last: bool) -> list[Part]:
        return [*self._reader.push(text), *(self._reader.finish() if is_last else ())]

    def _choice(self, **parts: Any) -> Json:
        return {"index": self._index, "logprobs": None, "finish_reason": None, **parts}


def _delta(part: Part) -> Json:
    """As a stream tells it."""
    if isinstance(part, str):
        return {"content": part}
    if isinstance(part, Begun):
        return {"tool_calls": [{"index": part.index, **_call(part)}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}


def _message(parts: Sequence[Part]) -> Json:
    """All of them. Calls may be all that there is."""
    calls = [_call(part) for part in parts if isinstance(part, Begun)]
    for part in parts:
        if isinstance(part, Arguments):
            calls[part.index]["function"]["arguments"] += part.text
    text = "".join(part for part in parts if isinstance(part, str))
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    return message | ({"content": text or None, "tool_calls": calls} if calls else {})


def _call(begun: Begun) -> Json:
    return {"id": begun.call_id, "type": "function", "function": {"name": begun.name, "arguments": ""}}


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
