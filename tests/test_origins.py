"""Who wrote what: against chunks whose tokens are known one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sequoia.generation import Answer, Chunk
from sequoia.origins import Origins, Piece
from sequoia.topology import TokenLogprobs
from sequoia.v1 import coordinator_pb2 as pb


def chunk(text: str, *tokens: bytes, num_accepted: int | None = None) -> Chunk:
    """A step; its last where it says how many tokens were accepted in all."""
    finish = pb.Finish(speculation=pb.SpeculationReport(num_accepted_tokens=num_accepted or 0))
    response = pb.GenerateResponse(text=text, token_ids=[5] * len(tokens), finish=finish)
    logprobs = tuple(TokenLogprobs(5, 0.0, 0.0, (), each) for each in tokens)
    whole = Answer().add(response)
    return replace(whole, logprobs=logprobs, generation=None if num_accepted is None else whole.generation)


def pieces(*chunks: Chunk) -> Sequence[tuple[Piece, ...]]:
    origins = Origins()
    return [origins.push(each) for each in chunks]


def test_the_last_token_of_a_step_is_the_targets() -> None:
    assert pieces(chunk("a", b"a"), chunk("bcd", b"b", b"c", b"d")) == [
        (Piece("a", False),),
        (Piece("bc", True), Piece("d", False)),
    ]


def test_an_answer_that_ends_within_accepted_tokens_has_no_token_of_the_target_there() -> None:
    assert pieces(chunk("a", b"a"), chunk("bc", b"b", b"c", num_accepted=4))[-1] == (Piece("bc", True),)


def test_an_answer_that_ends_with_a_whole_step_has_one() -> None:
    assert pieces(chunk("a", b"a"), chunk("bc", b"b", b"c", num_accepted=1))[-1] == (
        Piece("b", True),
        Piece("c", False),
    )


def test_a_character_of_two_tokens_is_the_second_ones() -> None:
    assert pieces(chunk("", b"\xc3"), chunk("éx", b"\xa9", b"x")) == [(), (Piece("é", True), Piece("x", False))]


def test_text_that_was_held_back_keeps_its_origin() -> None:
    assert pieces(chunk("a", b"ab"), chunk("bcd", b"c", b"d")) == [
        (Piece("a", False),),
        (Piece("b", False), Piece("c", True), Piece("d", False)),
    ]


def test_text_behind_a_stop_string_is_nobodys() -> None:
    assert pieces(chunk("a", b"a"), chunk("b", b"b", b"STOP", num_accepted=1))[-1] == (Piece("b", True),)


def test_special_tokens_and_a_first_space_that_is_stripped_have_no_text() -> None:
    assert pieces(chunk("The", b" The"), chunk(" sky", b"<x>", b" sky")) == [
        (Piece("The", False),),
        (Piece(" sky", False),),
    ]


def test_all_of_the_text_is_somebodys() -> None:
    assert pieces(chunk("abc", b"x")) == [(Piece("abc", False),)]
