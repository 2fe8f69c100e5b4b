"""Text and tokens: the target's own tokenizer, and text that grows token by token up to a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from tokenizers import Tokenizer

from coordinator.chat_template import ChatTemplate
from coordinator.conversation import Conversation
from coordinator.stops import StopMatcher
from coordinator.token_bytes import TokenBytes
from coordinator.tool_support import CLOSING, OPENING, ToolSupport, probe
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.v1 import worker_pb2

_NO_LIMIT = 2**31
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# Tokens kept as context for decoding the next one. A token is at least one byte and a character at most four, so four
# would do: decoding then agrees from the first byte after them.
_NUM_CONTEXT_TOKENS = 8


class TextCodec:
    """The target's tokenizer and chat template: text to token ids and back. Needs no model library."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self.token_bytes = TokenBytes(tokenizer)
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.get_added_tokens_decoder().values()
        self._special_tokens = frozenset(token.content for token in added if token.special)
        decoder = tokenizer.decoder
        self._has_byte_fallback = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        # In UTF-8, as the vocabulary writes them, which is never shorter than what they stand for.
        self._longest_token = max((len(each.encode()) for each in tokenizer.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be had."""
        return self._template is not None

    @staticmethod
    def from_files(files: worker_pb2.TokenizerFiles) -> TextCodec:
        """The codec of a verify worker's description. Raises FailedPrecondition for a malformed tokenizer."""
        try:
            tokenizer = Tokenizer.from_buffer(files.tokenizer_json)
        except ValueError as error:
            raise FailedPrecondition(
                f"the verify worker's tokenizer is not one that `tokenizers` reads: {error}"
            ) from error
        # Files saved after training may carry the lengths used there, which would cut prompts in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        template = ChatTemplate(files.chat_template, files.special_tokens) if files.chat_template else None
        return TextCodec(tokenizer, template, frozenset(files.eos_token_ids))

    def encode(self, text: str, most_tokens: int = _NO_LIMIT) -> tuple[int, ...]:
        """Token ids of raw text, with the special tokens the tokenizer itself adds, such as a leading `<s>`.

        Special tokens that are spelled out in the text count as such. Raises InvalidArgument naming `text` for one that
        so many tokens cannot hold, without looking at it.
        """
        self._check_length(text, most_tokens, "text")
        return tuple(self._tokenizer.encode(text).ids)

    def encode_chat(self, conversation: Conversation, most_tokens: int = _NO_LIMIT) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer.

        Special tokens are the template's business: none is added. Raises InvalidArgument naming `chat`, as `encode`
        does, or the part of it that the template would leave out.
        """
        if not conversation.messages:
            raise InvalidArgument("a conversation needs at least one message", "chat")
        if self._template is None:
            raise InvalidArgument("the model has no chat template; send text or token_ids", "chat")
        if conversation.concerns_tools:
            conversation = self._tool_support.told(conversation)
        text = self._template.render(conversation.messages, conversation.tools)
        self._check_length(text, most_tokens, "chat")
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _tool_support(self) -> ToolSupport:
        assert self._template is not None, "there is nothing else that could tell"
        found = probe(self._template)
        # What is special is not decoded, so that calls would be seen by nobody.
        is_seen = self._special_tokens.isdisjoint((OPENING, CLOSING))
        return replace(found, teaches_hermes_calls=found.teaches_hermes_calls and is_seen)

    def _check_length(self, text: str, most_tokens: int, field: str) -> None:
        most_bytes = most_tokens * self._longest_token
        if len(text) > most_bytes or len(text.encode()) > most_bytes:
            reason = (
                f"{len(text)} characters are more than {most_tokens} tokens of {self._longest_token} bytes can hold"
            )
            raise InvalidArgument(f"{reason}, which is all that the context takes; shorten it", field)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all the tokens; special tokens and ids beyond the vocabulary give nothing."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding leaves the token out: special tokens, and padding of the vocabulary."""
        token = self._tokenizer.id_to_token(token_id)
        return token is None or token in self._special_tokens

    def is_fallback_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte, such as `<0xE4>`, and decoded together with its neighbours."""
        token = self._tokenizer.id_to_token(token_id)
        return self._has_byte_fallback and token is not None and _BYTE_TOKEN.fullmatch(token) is not None


class Detokenizer:
    """The text of one answer, token by token: all pieces and the flush together are the decode of all tokens.

    A push decodes a window of at most 16 tokens and an open run of bytes. What may still change is held back: a last
    U+FFFD, which may be the head of a character, and a run of fallback bytes, of which one invalid byte makes every one
    a U+FFFD.

    Why not `tokenizers.decoders.DecodeStream` (0.23): it emits such runs early, so that its text differs from the full
    decode or it raises "Invalid prefix" (141 and 38 of 300 random runs); on invalid bytes its window, and so its time
    per token, grows without bound; and it has no flush.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text that are out
        self._num_run_bytes = 0  # fallback bytes at the window's end

    def push(self, token_id: int) -> str:
        """The text that this token makes final: whole characters, possibly none."""
        # Silent tokens stay out of the window: one alone would make the next token look like the first of the answer.
        if self._codec.is_silent(token_id):
            return ""
        self._window.append(token_id)
        if self._codec.is_fallback_byte(token_id):
            self._num_run_bytes += 1
            return ""
        self._num_run_bytes = 0
        text = self._codec.decode(self._window)
        piece = text[self._num_emitted : _num_final(text)]
        self._num_emitted += len(piece)
        if len(self._window) >= 2 * _NUM_CONTEXT_TOKENS:
            self._window = self._window[-_NUM_CONTEXT_TOKENS:]
            self._num_emitted = _num_final(self._codec.decode(self._window))
        return piece

    @property
    def pending(self) -> str:
        """Text that stands if the answer ends here, but that another token could undo: a valid open run of bytes."""
        if not self._num_run_bytes:
            return ""
        tail = self._codec.decode(self._window)[self._num_emitted :]
        return "" if tail.endswith(_REPLACEMENT * self._num_run_bytes) else tail

    def flush(self) -> str:
        """The rest at the end of the answer; a dangling half character is U+FFFD, as in a full decode."""
        tail = self._codec.decode(self._window)[self._num_emitted :]
        self._window, self._num_emitted, self._num_run_bytes = [], 0, 0
        return tail


class TextPiece(NamedTuple):
    """What one token added to the answer."""

    text: str
    stopped: bool  # a stop string is complete: `text` ends before it, and so does the answer


class TextStream:
    """The text of one answer as its tokens are committed: whole characters, nothing past a stop string.

    The answer stops at the first token after which its decoded text contains a stop string, also when that token is in
    the middle of an accepted run. The text does not depend on how the tokens were grouped into steps.
    """

    def __init__(self, codec: TextCodec, stops: tuple[str, ...] = ()) -> None:
        self.token_bytes = codec.token_bytes
        self._detokenizer = Detokenizer(codec)
        self._matcher = StopMatcher(stops)
        self._has_stops = bool(stops)

    def push(self, token_id: int, *, searched: bool = True) -> TextPiece:
        """The text that this committed token sets free. After a piece that stopped, push and flush give nothing.

        Text that is not `searched`, of tokens before all that are, is no part of a stop string.
        """
        if self._matcher.stopped:
            return TextPiece("", True)
        final = self._detokenizer.push(token_id)
        if not searched:
            return TextPiece(final, False)
        text = self._matcher.push(final, self._detokenizer.pending if self._has_stops else "")
        return TextPiece(text, self._matcher.stopped)

    def flush(self) -> str:
        """The text still held back, at the end of the answer.

        Only a stop string with U+FFFD in it can become complete here, through a dangling half character: the text is
        cut before it like any other.
        """
        if self._matcher.stopped:
            return ""
        return self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()


def _num_final(text: str) -> int:
    return len(text) - text.endswith(_REPLACEMENT)
