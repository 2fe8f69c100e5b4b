"""A reply in the API's shapes: one object, or the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from coordinator.gateway.answering import finished
from coordinator.gateway.asked import Asked
from coordinator.gateway.choices import ChatChoice, Choice, CompletionChoice, Json
from coordinator.gateway.served_model import ServedModel
from sequoia.client import Chunk, Generation

DONE = "data: [DONE]\n\n"


class Reply:
    """To one request: `whole` once, or `opening`, `pieces` and `closing` of a stream, which are events."""

    def __init__(self, asked: Asked, served: ServedModel) -> None:
        self._asked = asked
        self._choices = _choices(asked)
        self._generations: dict[int, Generation] = {}
        is_chat = asked.endpoint == "chat"
        kind = "chat.completion" if is_chat else "text_completion"
        self._kind = f"{kind}.chunk" if is_chat and asked.streams else kind
        self._envelope = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": served.fingerprint,
        }

    @property
    def usage(self) -> Json:
        """Of what has finished, by the coordinator's counts. Every prompt counts once, whatever n is."""
        firsts = (each for index, each in self._generations.items() if index % self._asked.num_choices == 0)
        prompts = [each.usage for each in firsts]
        num_prompt_tokens = sum(each.num_prompt_tokens for each in prompts)
        num_completion_tokens = sum(each.usage.num_completion_tokens for each in self._generations.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_prompt_tokens for each in prompts)},
        }

    def whole(self, found: Sequence[Sequence[Chunk]]) -> Json:
        """The reply as one object."""
        self._generations = dict(enumerate(map(finished, found)))
        choices = [choice.whole(chunks) for choice, chunks in zip(self._choices, found, strict=True)]
        return self._object(choices) | {"usage": self.usage}

    def opening(self) -> Iterator[str]:
        """The events before the first piece."""
        for choice in self._choices:
            yield from map(self._event, choice.opening())

    def pieces(self, index: int, chunk: Chunk) -> Iterator[str]:
        """The events of a piece of one choice."""
        if chunk.generation is not None:
            self._generations[index] = chunk.generation
        yield from map(self._event, self._choices[index].pieces(chunk))

    def closing(self) -> Iterator[str]:
        """The events behind the last piece."""
        if self._asked.tells_usage:
            yield event(self._object([]) | {"usage": self.usage})
        yield DONE

    def _event(self, choice: Json) -> str:
        # A client that asked for usage finds the field in every event, null until the last.
        usage = {"usage": None} if self._asked.tells_usage else {}
        return event(self._object([choice]) | usage)

    def _object(self, choices: list[Json]) -> Json:
        return {**self._envelope, "object": self._kind, "choices": choices}


def event(told: Any) -> str:
    """One server-sent event, in ASCII: some clients end lines at characters where the standard does not."""
    return f"data: {json.dumps(told, separators=(',', ':'))}\n\n"


def _choices(asked: Asked) -> list[Choice]:
    if asked.endpoint == "chat":
        return [ChatChoice(asked, index) for index in range(asked.num_choices)]
    echoes = (prompt if asked.echoes and isinstance(prompt, str) else "" for prompt, _ in asked.requests)
    return [CompletionChoice(asked, index, echo) for index, echo in enumerate(echoes)]
