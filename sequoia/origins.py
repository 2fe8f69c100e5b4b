"""Who wrote which piece of an answer: the draft, whose guess was accepted, or the target itself."""

from __future__ import annotations

import codecs
from collections import deque
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from sequoia.generation import Chunk


class Piece(NamedTuple):
    """Text of tokens in a row that have the same origin."""

    text: str
    is_drafted: bool


class Origins:
    """Divides the chunks of one answer, asked for with logprobs (0 will do), by who wrote them.

    A chunk is a step: accepted tokens, all of the draft, and one of the target's own. A character that two tokens make
    together is the second one's.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting: deque[Piece] = deque()  # of tokens whose text is held back as yet
        self.num_drafted = 0  # tokens so far that were the draft's

    def push(self, chunk: Chunk) -> tuple[Piece, ...]:
        """The pieces of the chunk's text, in order: together they are all of it."""
        num_drafted = self._num_drafted_of(chunk)
        self.num_drafted += num_drafted
        for index, each in enumerate(chunk.logprobs):
            self._waiting.append(Piece(self._decoder.decode(each.token_bytes), index < num_drafted))
        pieces = groupby(self._taken(chunk.text), attrgetter("is_drafted"))
        return tuple(Piece("".join(each.text for each in group), is_drafted) for is_drafted, group in pieces)

    def _num_drafted_of(self, chunk: Chunk) -> int:
        """The last step may end within accepted tokens; that their number is told in all shows it."""
        num_tokens = len(chunk.token_ids)
        if chunk.generation is None:
            return max(0, num_tokens - 1)
        num_accepted = chunk.generation.speculation.num_accepted_tokens - self.num_drafted
        return min(num_tokens, max(0, num_accepted))

    def _taken(self, text: str) -> list[Piece]:
        """What the waiting tokens have of the text; a token that does not appear in it, a special one, is left out."""
        taken: list[Piece] = []
        while text and self._waiting:
            token = self._waiting.popleft()
            # The first token of an answer may lose its space.
            spellings = (token.text, token.text.removeprefix(" "))
            written = next((each for each in spellings if each and text.startswith(each)), "")
            if written:
                taken.append(Piece(written, token.is_drafted))
                text = text[len(written) :]
            elif token.text.startswith(text):
                taken.append(Piece(text, token.is_drafted))
                self._waiting.appendleft(Piece(token.text[len(text) :], token.is_drafted))
                text = ""
        return [*taken, Piece(text, False)] if text else taken
