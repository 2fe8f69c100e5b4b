"""What a request asks of sampling: the parameters, their defaults, their bounds, and the rule that honours them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sequoia.rules import ParameterError, Rule

MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKENS = 64
MAX_SCHEMA_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Bounds:
    """The numbers a parameter may have."""

    least: float
    most: float
    least_excluded: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.least_excluded else value >= self.least
        return math.isfinite(value) and above and value <= self.most

    def __str__(self) -> str:
        return (
            f"{'above' if self.least_excluded else 'from'} {self.least:g} {'up ' * self.least_excluded}to {self.most:g}"
        )


BOUNDS = {
    "temperature": Bounds(0.0, 100.0),
    "top_p": Bounds(0.0, 1.0, least_excluded=True),
    "top_k": Bounds(0, 2**31 - 1),
    "min_p": Bounds(0.0, 1.0),
    "repetition_penalty": Bounds(0.01, 100.0),
    "presence_penalty": Bounds(-2.0, 2.0),
    "frequency_penalty": Bounds(-2.0, 2.0),
    "seed": Bounds(0, 2**64 - 1),
    "min_tokens": Bounds(0, 2**31 - 1),
    "num_logprobs": Bounds(0, MAX_LOGPROBS),
}
_BIAS_BOUNDS = Bounds(-100.0, 100.0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """A request's sampling parameters. Raises ParameterError naming the first that is out of bounds.

    They act on a node's logits in this order: `logit_bias` is added; before the first `min_tokens` generated tokens,
    `stop_token_ids` are impossible; what `json_schema` does not admit after the node's own path is impossible;
    penalties, over the tokens on that path (`repetition_penalty` counts the prompt, the others do not); `temperature`;
    `min_p`, `top_k`, `top_p`, each over what the cut before it left.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), ascending
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the tokens that end the answer
    num_logprobs: int | None = None  # alternatives beside each token's own; None: no logprobs at all
    seed: int | None = None
    json_schema: str | None = None  # what the answer is held to, as JSON

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and value not in bounds:
                raise ParameterError(f"is {value:g}; it must be {bounds}", name)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise ParameterError(f"names {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIASES}", "logit_bias")
        for token_id, bias in self.logit_bias:
            if bias not in _BIAS_BOUNDS:
                raise ParameterError(f"of token {token_id} is {bias:g}; it must be {_BIAS_BOUNDS}", "logit_bias")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ParameterError(f"has {len(self.stop_token_ids)} ids; at most {MAX_STOP_TOKENS}", "stop_token_ids")
        if self.json_schema is not None:
            if (size := len(self.json_schema.encode())) > MAX_SCHEMA_BYTES:
                raise ParameterError(f"has {size} bytes; at most {MAX_SCHEMA_BYTES}", "json_schema")
            if self.min_tokens:
                raise ParameterError("goes without json_schema, by which the answer may have to end", "min_tokens")

    @property
    def greedy(self) -> bool:
        """Whether the target's argmax is the answer."""
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """Whether p depends on which tokens are on the path."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def adjusts(self, num_generated: int) -> bool:
        """Whether the logits after `num_generated` generated tokens are changed before the temperature."""
        is_held = self.json_schema is not None
        return self.penalises or bool(self.logit_bias) or is_held or num_generated < self.min_tokens

    @property
    def given(self) -> frozenset[str]:
        """Names of the parameters that differ from their defaults."""
        return frozenset(each.name for each in fields(self) if getattr(self, each.name) != _DEFAULTS[each.name])


_DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Sampling)}
PARAMETERS = tuple(_DEFAULTS)
# With those that are the coordinator's business, whatever the rule.
REQUEST_PARAMETERS = (*PARAMETERS, "ignore_eos", "max_tokens", "stop")


class Constraint(Protocol):
    """What an answer is held to."""

    def allowed(self, generated: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Which tokens may follow these, (vocabulary,), at least one; None: all, behind the answer's end, and behind a
        token that was not allowed, where no answer gets.
        """
        ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a session's tokens come about: by which rule, from which distribution, and where its prompt ends."""

    rule: Rule
    sampling: Sampling
    num_prompt_tokens: int
    constraint: Constraint | None = None  # of `json_schema`, where the target is
