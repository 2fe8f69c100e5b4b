"""Logprobs in both shapes that the API has for them. They are the model's own: before temperature, bias and cuts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from sequoia.topology import TokenLogprobs

# What the API has for minus infinity, which JSON has not.
_LEAST = -9999.0


def chat_logprobs(logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Of a choice, or a piece of one, of a chat."""
    content = [
        {
            **_told(each.token_bytes, each.raw),
            "top_logprobs": [
                _told(token_bytes, raw) for (_, raw, _), token_bytes in zip(each.top, each.top_bytes, strict=True)
            ],
        }
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of one choice of a completion, piece by piece: offsets count characters from the beginning of its text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def push(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of the tokens that come next. The token itself is always among the likeliest that are told."""
        return {
            "tokens": [token_name(each.token_bytes) for each in logprobs],
            "token_logprobs": [max(_LEAST, each.raw) for each in logprobs],
            "top_logprobs": [_likeliest(each) for each in logprobs],
            "text_offset": [self._advance(each.token_bytes) for each in logprobs],
        }

    def _advance(self, token_bytes: bytes) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(token_bytes))
        return offset


def token_name(token_bytes: bytes) -> str:
    """The token as a string; one that is not a whole number of characters is told byte by byte, as OpenAI does."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _told(token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_name(token_bytes), "logprob": max(_LEAST, logprob), "bytes": list(token_bytes)}


def _likeliest(logprobs: TokenLogprobs) -> dict[str, float]:
    named = [(logprobs.top_bytes[index], raw) for index, (_, raw, _) in enumerate(logprobs.top)]
    # Two tokens may have the same text: the likelier one stands.
    found = {token_name(each): max(_LEAST, raw) for each, raw in reversed([*named])}
    return {token_name(logprobs.token_bytes): max(_LEAST, logprobs.raw)} | dict(reversed(found.items()))
