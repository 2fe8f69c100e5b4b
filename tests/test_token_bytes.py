"""The bytes of single tokens, against the decode of all of them."""

from __future__ import annotations

import random

import pytest
from test_text import TOKENIZERS, codec_of, random_text


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace"])
def test_the_bytes_of_all_tokens_are_the_text(name: str) -> None:
    codec, rng = codec_of(TOKENIZERS[name]), random.Random(3)
    for _ in range(50):
        token_ids = [token_id for token_id in codec.encode(random_text(rng)) if not codec.is_silent(token_id)]
        text = b"".join(codec.token_bytes[token_id] for token_id in token_ids).decode(errors="replace")
        assert text in (codec.decode(token_ids), " " + codec.decode(token_ids))


def test_a_part_of_a_character_is_its_bytes() -> None:
    codec = codec_of(TOKENIZERS["byte_fallback"])
    tokenizer = TOKENIZERS["byte_fallback"]
    assert codec.token_bytes[tokenizer.token_to_id("<0xE4>")] == b"\xe4"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_special_token_has_its_name_and_padding_has_nothing(name: str) -> None:
    codec = codec_of(TOKENIZERS[name])
    assert codec.token_bytes[TOKENIZERS[name].token_to_id("</s>")] == b"</s>"
    assert codec.token_bytes[TOKENIZERS[name].get_vocab_size() + 5] == b""
