"""Text and tokens: against full decodes and brute-force stop rules."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from coordinator.conversation import Conversation, question
from coordinator.stops import StopMatcher, parse_stops
from coordinator.text import Detokenizer, TextCodec, TextStream
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.v1 import worker_pb2

SPECIAL = ["<s>", "</s>"]
ALPHABETS = ("abc ", "the quick  brown\n", "éßñ", "你好世界", "😀👩‍👩‍👧🇩🇪", "e\u0301a\u0308 ", "\ufffd\u200d")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<answer>"
)


def random_text(rng: random.Random, length: int = 30) -> str:
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(length))


def byte_level() -> Tokenizer:
    """Byte-level BPE whose merges cross the borders of characters and words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([random_text(rng) for _ in range(200)], trainer)
    tokenizer.add_tokens(["<tool>", "Ġ你"])
    return tokenizer


def unigram(*, byte_fallback: bool) -> Tokenizer:
    """The shape of converted SentencePiece models: spaces as `▁`, the first one stripped."""
    words = ["▁", "▁the", "▁a", "the", "quick", *"abcdehiknoqrtuw", "你", "好", "é", "\u0301", "😀", "▁▁", "a▁"]
    vocabulary = [("<unk>", -20.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -2.0 - len(word)) for word in words)]
    vocabulary += [(f"<0x{byte:02X}>", -15.0) for byte in range(256)] if byte_fallback else []
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if byte_fallback:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["[UNK]", *SPECIAL, "the", "##re", "##s", ".", "do", "n't", "你"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def codec_of(tokenizer: Tokenizer, **files: object) -> TextCodec:
    return TextCodec.from_files(worker_pb2.TokenizerFiles(tokenizer_json=tokenizer.to_str().encode(), **files))


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": unigram(byte_fallback=True),
    "metaspace": unigram(byte_fallback=False),
    "word_piece": word_piece(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def answers(tokenizer: Tokenizer, count: int, seed: int = 1) -> Iterator[list[int]]:
    """Token ids of texts, of texts with specials strewn in, and of noise with ids beyond the vocabulary."""
    rng = random.Random(seed)
    for _ in range(count):
        ids = tokenizer.encode(random_text(rng)).ids
        yield ids
        yield [token for each in ids for token in ([1, each] if rng.random() < 0.3 else [each])]
        yield [rng.randrange(tokenizer.get_vocab_size() + 2) for _ in range(40)]
        yield [rng.randrange(tokenizer.get_vocab_size()) for _ in range(3)] * 15


def test_pieces_and_flush_together_are_the_full_decode(tokenizer: Tokenizer) -> None:
    codec = codec_of(tokenizer)
    for ids in answers(tokenizer, 60):
        detokenizer = Detokenizer(codec)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tokenizer.decode(ids)


def test_what_is_out_is_never_taken_back(tokenizer: Tokenizer) -> None:
    """No piece ends inside a character: what is out stays a prefix of the decode, whatever token comes next."""
    codec = codec_of(tokenizer)
    continuations = random.Random(2).sample(range(tokenizer.get_vocab_size()), min(tokenizer.get_vocab_size(), 25))
    for ids in answers(tokenizer, 2):
        detokenizer, out = Detokenizer(codec), ""
        for position, token in enumerate(ids, start=1):
            out += detokenizer.push(token)
            assert all(tokenizer.decode([*ids[:position], each]).startswith(out) for each in continuations)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(codec_of(tokenizer))
    ids = [tokenizer.token_to_id(each) for each in pre_tokenizers.ByteLevel(False).pre_tokenize_str("🦊")[0][0]]
    assert [detokenizer.push(token) for token in ids] == ["", "", "", "🦊"]
    assert [detokenizer.push(token) for token in ids[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"


def test_space_survives_after_a_special_token() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    detokenizer = Detokenizer(codec_of(tokenizer))
    word, special = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("</s>")
    assert [detokenizer.push(token) for token in (special, word, special, word)] == ["", "the", "", " the"]


def test_a_token_costs_the_same_after_any_number_of_tokens() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(codec_of(tokenizer))
    started = time.perf_counter()
    out = "".join(detokenizer.push(tokenizer.token_to_id("Ã")) for _ in range(20_000))
    assert out == "\ufffd" * 19_999
    assert time.perf_counter() - started < 5  # 0.2 s in a window, half a minute over the whole text


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the text is cut, character by character: the first match to be complete, the longest of those."""
    for end in range(len(text) + 1):
        if starts := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return min(starts)
    return None


def stopped_answer(tokenizer: Tokenizer, ids: list[int], stops: Sequence[str]) -> tuple[str, int | None]:
    """The text that must arrive and the number of tokens it takes, from a full decode after every token."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if (cut := first_stop(text, stops)) is not None:
            return text[:cut], count
    return tokenizer.decode(ids), None


def random_stops(rng: random.Random, text: str) -> tuple[str, ...]:
    """Pieces of the text, whole and with a wrong last character, without U+FFFD."""
    starts = [rng.randrange(max(len(text), 1)) for _ in range(rng.randrange(1, 4))]
    pieces = [text[start : start + rng.randrange(1, 5)] for start in starts]
    stops = [piece if rng.random() < 0.7 else piece + "☂" for piece in pieces]
    return tuple(stop for stop in stops if stop and "\ufffd" not in stop)


def test_streamed_text_ends_before_the_first_stop_string(tokenizer: Tokenizer) -> None:
    codec, rng = codec_of(tokenizer), random.Random(3)
    num_stopped = 0
    for ids in answers(tokenizer, 60):
        stops = random_stops(rng, tokenizer.decode(ids))
        stream, text, count = TextStream(codec, stops), "", None
        for position, token in enumerate(ids, start=1):
            piece = stream.push(token)
            text += piece.text
            if piece.stopped:
                count = position
                break
        assert (text + stream.flush(), count) == stopped_answer(tokenizer, ids, stops)
        num_stopped += count is not None
    assert num_stopped > 50


def test_nothing_leaks_after_a_stop() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(codec_of(tokenizer), ("世",))
    pieces = [stream.push(token) for token in tokenizer.encode("你好世界, more").ids]
    assert "".join(piece.text for piece in pieces) + stream.flush() == "你好"
    assert pieces[-1].stopped


def test_newline_as_fallback_byte_stops_at_once() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    stream = TextStream(codec_of(tokenizer), ("\n\n",))
    ids = [tokenizer.token_to_id(token) for token in ("▁the", "<0x0A>", "<0x0A>")]
    assert [stream.push(token) for token in ids] == [("the", False), ("", False), ("", True)]


def test_half_a_character_in_fallback_bytes_is_no_replacement_character_yet() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    stream = TextStream(codec_of(tokenizer), ("\ufffd",))
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (*"☂".encode(), *"\ufffd".encode())]
    assert [stream.push(token).stopped for token in ids] == [False, False, False, False, False, True]


def test_stop_string_that_ends_in_a_dangling_half_character_cuts_the_flush() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(codec_of(tokenizer), ("c\ufffd",))
    pieces = [stream.push(token).text for token in (*tokenizer.encode("qc").ids, tokenizer.token_to_id("ð"))]
    assert "".join(pieces) + stream.flush() == "q"


def test_held_text_is_exactly_the_longest_suffix_that_could_become_a_stop() -> None:
    rng = random.Random(4)
    for _ in range(300):
        stops = tuple("".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(3))
        matcher, text, out = StopMatcher(stops), "", ""
        for _ in range(12):
            addition = "".join(rng.choices("abc", k=rng.randrange(4)))
            text += addition
            out += matcher.push(addition)
            if matcher.stopped:
                break
            suffixes = (text[start:] for start in range(len(text) + 1))
            held = next(suffix for suffix in suffixes if any(s.startswith(suffix) and s != suffix for s in stops))
            assert out + held == text
        cut = first_stop(text, stops)
        assert out + matcher.flush() == text[:cut]


def test_text_is_the_same_however_characters_are_grouped_into_pieces() -> None:
    text, stops = "xabcdx", ("abcd", "c", "bc")
    for borders in itertools.product((False, True), repeat=len(text) - 1):
        matcher, out, piece = StopMatcher(stops), "", ""
        for character, border in zip(text, (*borders, True), strict=True):
            piece += character
            if border and not matcher.stopped:
                out, piece = out + matcher.push(piece), ""
        assert out == "xa"


def test_stop_strings_are_read_as_utf8() -> None:
    assert parse_stops([b"\n", "世".encode(), b"x" * 256]) == ("\n", "世", "x" * 256)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ([b"ok", b""], "stop[1]"),
        ([b"x" * 257], "stop[0]"),
        ([b"a", b"b", b"c\xff"], "stop[2]"),
        ([b"x"] * 17, "stop"),
    ],
)
def test_bad_stop_is_refused_by_name(raw: list[bytes], field: str) -> None:
    with pytest.raises(InvalidArgument, match="send") as error:
        parse_stops(raw)
    assert error.value.field == field


def test_raw_text_gets_the_tokenizers_own_special_tokens_and_is_never_cut() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["byte_level"].to_str())
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", tokenizer.token_to_id("<s>"))])
    plain = tokenizer.encode("abc the quick", add_special_tokens=False).ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    codec = codec_of(tokenizer, eos_token_ids=[1, 7])
    assert codec.encode("abc the quick") == (tokenizer.token_to_id("<s>"), *plain)
    assert codec.eos_token_ids == {1, 7}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"version": "1.0"}', b'{"model": {"type": "Magic"}}'])
def test_malformed_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(FailedPrecondition, match="tokenizer"):
        TextCodec.from_files(worker_pb2.TokenizerFiles(tokenizer_json=content))


def test_conversation_is_encoded_from_the_rendered_template() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    codec = codec_of(tokenizer, chat_template=CHAT_TEMPLATE, special_tokens={"bos_token": "<s>"})
    ids = codec.encode_chat(question("hi 世"))
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s><user>hi 世<answer>"
    assert ids[0] == tokenizer.token_to_id("<s>")


def test_chat_without_a_template_is_refused_and_text_is_not() -> None:
    codec = codec_of(TOKENIZERS["byte_level"])
    with pytest.raises(InvalidArgument, match="no chat template"):
        codec.encode_chat(question("hi"))
    assert codec.encode("hi")


def test_conversation_without_messages_is_refused() -> None:
    codec = codec_of(TOKENIZERS["byte_level"], chat_template=CHAT_TEMPLATE)
    with pytest.raises(InvalidArgument, match="at least one message"):
        codec.encode_chat(Conversation([]))
