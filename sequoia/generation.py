"""What comes out of a request: the answer in pieces and as a whole, from its wire form."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sequoia.errors import Internal
from sequoia.speculation_figures import SpeculationFigures, figures_from_wire
from sequoia.topology import TokenLogprobs
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import sampling_pb2
from sequoia.wire import logprobs_from_wire, rule_name


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times count from its arrival at the coordinator."""

    num_prompt_tokens: int
    num_completion_tokens: int
    time_to_first_token_seconds: float
    total_seconds: float
    num_cached_prompt_tokens: int  # the first of the prompt that the target had read for another request

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by total time, prefill included."""
        return self.num_completion_tokens / self.total_seconds if self.total_seconds else 0.0

    @property
    def time_per_output_token_seconds(self) -> float:
        """Time per generated token after the first (TPOT); 0 for a single token."""
        num_tokens = self.num_completion_tokens - 1
        return (self.total_seconds - self.time_to_first_token_seconds) / num_tokens if num_tokens > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer. `token_ids` holds the end-of-sequence token, `text` does not.

    `seed` is the one that determines the text, given or drawn by the server; None when none does. `logprobs` has one
    entry a token when they were asked for, else none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    speculation: SpeculationFigures
    rule: str
    seed: int | None
    logprobs: tuple[TokenLogprobs, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: text, token_ids, finish_reason, rule, seed, usage, speculation, and logprobs if any."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "rule": self.rule,
            "seed": self.seed,
            **({"logprobs": [_logprobs_to_dict(each) for each in self.logprobs]} if self.logprobs else {}),
            "usage": {
                **asdict(self.usage),
                "time_per_output_token_seconds": self.usage.time_per_output_token_seconds,
                "tokens_per_second": self.usage.tokens_per_second,
            },
            "speculation": self.speculation.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer, as it was committed. Only the last carries the whole `generation`."""

    text: str
    token_ids: tuple[int, ...]
    generation: Generation | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class OutOfStep(Exception):
    """A piece of an answer that does not follow what was received before it."""


@dataclass(slots=True)
class Answer:
    """The responses of one call so far, folded into what the caller sees."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prompt_tokens: int = 0
    generation: Generation | None = None
    rule: sampling_pb2.Rule | None = None  # in effect, once it is known
    seed: int | None = None
    started: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None
    is_resumed: bool = False

    def resume(self, request: pb.GenerateRequest) -> None:
        """Make the request ask for what is missing."""
        self.is_resumed = True
        request.generated_token_ids[:] = self.token_ids
        if self.rule is not None:
            request.speculation.rule = self.rule
        if self.seed is not None:
            request.sampling.seed = self.seed

    def add(self, response: pb.GenerateResponse) -> Chunk:
        """The next piece. Raises OutOfStep for one that is not."""
        if response.HasField("num_tokens_before") and response.num_tokens_before != len(self.token_ids):
            raise OutOfStep(f"a piece came behind {response.num_tokens_before} tokens, not {len(self.token_ids)}")
        self.num_prompt_tokens = self.num_prompt_tokens or response.num_prompt_tokens
        self.rule, self.seed = response.rule, response.seed if response.HasField("seed") else None
        if response.token_ids and self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.started
        self.text += response.text
        self.token_ids += response.token_ids
        logprobs = tuple(map(logprobs_from_wire, response.logprobs))
        self.logprobs += logprobs
        if response.HasField("finish"):
            self.generation = self._finish(response)
        return Chunk(response.text, tuple(response.token_ids), self.generation, logprobs)

    def finished(self) -> Generation:
        if self.generation is None:
            raise Internal("the coordinator ended the answer without saying how it finished")
        return self.generation

    def _finish(self, response: pb.GenerateResponse) -> Generation:
        finish = response.finish
        return Generation(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason="length" if finish.reason == pb.FINISH_REASON_LENGTH else "stop",
            usage=Usage(
                num_prompt_tokens=self.num_prompt_tokens,
                num_completion_tokens=finish.num_completion_tokens,
                time_to_first_token_seconds=self._own(finish.time_to_first_token_seconds, self.first_token_seconds),
                total_seconds=self._own(finish.total_seconds, time.monotonic() - self.started),
                num_cached_prompt_tokens=finish.num_cached_prompt_tokens,
            ),
            speculation=figures_from_wire(finish.speculation),
            rule=rule_name(response.rule),
            seed=self.seed,
            logprobs=tuple(self.logprobs),
        )

    def _own(self, told: float, measured: float | None) -> float:
        """What the coordinator tells, unless it knows of a part only."""
        return measured if self.is_resumed and measured is not None else told


def _logprobs_to_dict(logprobs: TokenLogprobs) -> dict[str, Any]:
    """Ready for JSON, which has no -inf: the processed logprob of a token that was cut is null."""
    top = [{"token_id": t, "raw": raw, "processed": _finite(processed)} for t, raw, processed in logprobs.top]
    return {"token_id": logprobs.token_id, "raw": logprobs.raw, "processed": _finite(logprobs.processed), "top": top}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
