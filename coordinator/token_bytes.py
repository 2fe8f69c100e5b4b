"""What a single token stands for, in bytes: a client that is sent logprobs has no tokenizer to look it up in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

_FALLBACK_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


class TokenBytes:
    """The bytes of each token of a vocabulary, whatever stands before and behind it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._names = {token_id: token.content for token_id, token in added if token.special}
        kinds = set(_kinds(tokenizer.decoder))
        self._byte_by_letter = _byte_by_letter() if "ByteLevel" in kinds else None
        self._has_fallback = "ByteFallback" in kinds

    def __getitem__(self, token_id: int) -> bytes:
        """Of a special token its name; of an id that pads the vocabulary nothing."""
        if token_id in self._names:
            return self._names[token_id].encode()
        token = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_by_letter is not None:
            # An added token may be written as what it is.
            is_written = self._byte_by_letter.keys() >= set(token)
            return bytes(self._byte_by_letter[letter] for letter in token) if is_written else token.encode()
        if self._has_fallback and (found := _FALLBACK_BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return token.replace(_METASPACE, " ").encode()


def _kinds(decoder: Any) -> Iterator[str]:
    """The types of a decoder and of those it consists of, by their names in tokenizer.json."""
    described = [json.loads(decoder.__getstate__())] if decoder is not None else []
    while described:
        each = described.pop()
        yield each["type"]
        described += each.get("decoders", ())


def _byte_by_letter() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes (GPT-2): printable ones as they are, then from U+0100."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
