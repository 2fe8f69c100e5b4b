"""The committed tokens of one request, and what a client gets to see of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.text import TextStream
from sequoia.errors import InvalidArgument
from sequoia.sampling import Sampling
from sequoia.v1 import coordinator_pb2, sampling_pb2


@dataclass(frozen=True, slots=True)
class Step:
    """What one verdict added: text and tokens up to the end of the answer, and the end's reason if it was reached."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: coordinator_pb2.FinishReason | None
    logprobs: tuple[sampling_pb2.TokenLogprobs, ...] = ()  # one a token, when asked for


class Transcript:
    """Prompt and generated tokens: the truth from which either worker can be rebuilt.

    A verdict's tokens are taken one by one, so an end inside an accepted run cuts the run there.
    """

    def __init__(self, prompt: tuple[int, ...], max_tokens: int, sampling: Sampling, text: TextStream) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self._max_tokens, self._min_tokens = max_tokens, sampling.min_tokens
        self._stop_token_ids, self._text = frozenset(sampling.stop_token_ids), text

    def resume(self, token_ids: Sequence[int]) -> None:
        """Take tokens whose text the client has. Raises InvalidArgument naming them when the answer ends there."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            if self._take(token_id)[1] is not None:
                raise InvalidArgument("the answer ends within them: nothing is left", "generated_token_ids")

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens, an end-of-sequence token included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_left(self) -> int:
        """Tokens until the length limit."""
        return self._max_tokens - self.num_completion_tokens

    def commit(self, token_ids: Sequence[int], logprobs: Sequence[sampling_pb2.TokenLogprobs] = ()) -> Step:
        """Take a verdict's tokens, at least one, up to the end of the answer."""
        text: list[str] = []
        for index, token_id in enumerate(token_ids, start=1):
            self.token_ids.append(token_id)
            piece, reason = self._take(token_id)
            text.append(piece)
            if reason is not None:
                return Step("".join(text), tuple(token_ids[:index]), reason, self._named(logprobs[:index]))
        return Step("".join(text), tuple(token_ids), None, self._named(logprobs))

    def _named(self, logprobs: Sequence[sampling_pb2.TokenLogprobs]) -> tuple[sampling_pb2.TokenLogprobs, ...]:
        """With the bytes of every token."""
        for each in logprobs:
            each.token_bytes = self._text.token_bytes[each.token_id]
            for likely in each.top:
                likely.token_bytes = self._text.token_bytes[likely.token_id]
        return tuple(logprobs)

    def _take(self, token_id: int) -> tuple[str, coordinator_pb2.FinishReason | None]:
        may_stop = self.num_completion_tokens > self._min_tokens
        if may_stop and token_id in self._stop_token_ids:
            return self._text.flush(), coordinator_pb2.FINISH_REASON_STOP
        piece = self._text.push(token_id, searched=may_stop)
        if piece.stopped:
            return piece.text, coordinator_pb2.FINISH_REASON_STOP
        if self.num_tokens_left == 0:
            return piece.text + self._text.flush(), coordinator_pb2.FINISH_REASON_LENGTH
        return piece.text, None
