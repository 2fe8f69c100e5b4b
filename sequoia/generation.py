"""What goes into a request and what comes out of it: the values of the client, and their wire form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

from google.protobuf.message import Message as ProtoMessage

from sequoia.errors import Internal, InvalidArgument
from sequoia.rules import RULES
from sequoia.topology import TokenLogprobs, Topology
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import sampling_pb2, tree_pb2
from sequoia.wire import logprobs_from_wire, rule_name, rule_to_wire


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
Speculation: TypeAlias = Literal["auto", "off", "tree"] | Topology
Stop: TypeAlias = Sequence[str | bytes]


class RequestOptions(TypedDict, total=False):
    """What a request may say beside its prompt. What is left out, or None, takes the server's default.

    The parameters act on p as sequoia.sampling.Sampling tells; each is honoured exactly or refused by name.
    """

    max_tokens: int | None  # most tokens to generate
    temperature: float | None  # 0 is greedy
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]  # token id -> what is added to its logit
    seed: int | None  # the same text for the same seed, whatever the draft and the tree
    stop: Stop  # strings that end the answer
    stop_token_ids: Sequence[int]  # tokens that end the answer, besides the model's own
    ignore_eos: bool | None  # go on at the model's own end-of-sequence tokens
    min_tokens: int | None  # nothing ends the answer before it has so many
    logprobs: int | None  # logarithms of probabilities, with so many likeliest tokens beside each
    speculation: Speculation
    rule: str | None  # a name of sequoia.rules.RULES


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times count from its arrival at the coordinator."""

    num_prompt_tokens: int
    num_completion_tokens: int
    time_to_first_token_seconds: float
    total_seconds: float

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
class StageSeconds:
    """Wall time of all steps of a request by where it went; prefill is the opening, apart from the steps."""

    draft: float
    verify: float
    network: float
    host: float
    prefill: float


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """What speculation did for a request. A tree of size 1 and 1 level is plain decoding."""

    num_steps: int
    num_drafted_steps: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    tree_size: int
    tree_levels: int
    stage_seconds: StageSeconds
    offered_by_rank: tuple[int, ...]
    accepted_by_rank: tuple[int, ...]
    num_fallback_steps: int
    fallback_reason: str

    @property
    def mean_tokens_per_step(self) -> float:
        """Accepted tokens plus the bonus token, by step; 0 without a step."""
        return (self.num_accepted_tokens + self.num_steps) / self.num_steps if self.num_steps else 0.0


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
        speculation = asdict(self.speculation)
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
            "speculation": {
                "steps": speculation.pop("num_steps"),
                "mean_tokens_per_step": self.speculation.mean_tokens_per_step,
                "tree": {"size": speculation.pop("tree_size"), "levels": speculation.pop("tree_levels")},
                "seconds": speculation.pop("stage_seconds"),
                **speculation,
            },
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer, as it was committed. Only the last carries the whole `generation`."""

    text: str
    token_ids: tuple[int, ...]
    generation: Generation | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


_WHOLE = "a whole number from 0 to 2**32 - 1"
# Options that are fields of the wire's Sampling, by the names they have there.
_SCALARS = {
    "temperature": ("temperature", "a number"),
    "top_p": ("top_p", "a number"),
    "top_k": ("top_k", _WHOLE),
    "min_p": ("min_p", "a number"),
    "repetition_penalty": ("repetition_penalty", "a number"),
    "presence_penalty": ("presence_penalty", "a number"),
    "frequency_penalty": ("frequency_penalty", "a number"),
    "seed": ("seed", "a whole number from 0 to 2**64 - 1"),
    "ignore_eos": ("ignore_eos", "true or false"),
    "min_tokens": ("min_tokens", _WHOLE),
    "logprobs": ("num_logprobs", _WHOLE),
}


def build_request(prompt: Prompt, options: RequestOptions) -> pb.GenerateRequest:
    """The wire form of a request; what is None is left out. Raises InvalidArgument naming the argument."""
    if unknown := sorted(options.keys() - RequestOptions.__annotations__.keys()):
        raise InvalidArgument(f"is no option; known are {', '.join(RequestOptions.__annotations__)}", unknown[0])
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    _set(request, "max_tokens", options.get("max_tokens"), "max_tokens", "a whole number from 1 to 2**32 - 1")
    for name, (field_name, expected) in _SCALARS.items():
        _set(request.sampling, field_name, options.get(name), name, expected)
    _set_tokens(request.sampling, options)
    _set_stop(request, options.get("stop", ()))
    request.speculation.CopyFrom(_speculation(options.get("speculation", "auto"), options.get("rule")))
    return request


def _set(message: ProtoMessage, field_name: str, value: object, name: str, expected: str) -> None:
    if value is None:
        return
    try:
        setattr(message, field_name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{value!r} is not {expected}", name) from error


def _set_tokens(sampling: sampling_pb2.Sampling, options: RequestOptions) -> None:
    biases, stops = options.get("logit_bias") or {}, options.get("stop_token_ids") or ()
    try:
        sampling.logit_bias.update(biases)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"{biases!r} does not map token ids to numbers: {error}", "logit_bias") from error
    try:
        sampling.stop_token_ids.extend(stops)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{stops!r} is not a list of token ids: {error}", "stop_token_ids") from error


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    try:
        if isinstance(prompt, str):
            request.text = prompt
            return
        messages = [each for each in prompt if isinstance(each, Message)]
        token_ids = [each for each in prompt if not isinstance(each, Message)]
        if isinstance(prompt, bytes) or bool(messages) == bool(token_ids):
            raise InvalidArgument(
                "give text, a list of Message or a list of token ids, not empty and not mixed", "prompt"
            )
        if messages:
            request.chat.messages.extend(pb.ChatMessage(role=each.role, content=each.content) for each in messages)
        else:
            request.token_ids.ids.extend(token_ids)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"neither text nor a list of Message or token ids: {error}", "prompt") from error


def _set_stop(request: pb.GenerateRequest, stop: Stop) -> None:
    if isinstance(stop, str | bytes):
        raise InvalidArgument("give a list of strings, not one string", "stop")
    try:
        request.stop.extend(each.encode() if isinstance(each, str) else each for each in stop)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{stop!r} is not a list of strings in UTF-8: {error}", "stop") from error


_MODES = {"auto": pb.SPECULATION_MODE_AUTO, "off": pb.SPECULATION_MODE_OFF, "tree": pb.SPECULATION_MODE_TREE}


def _speculation(speculation: Speculation, rule: str | None) -> pb.Speculation:
    if rule is not None and rule not in RULES:
        raise InvalidArgument(f"{rule!r} is none of {', '.join(RULES)}", "rule")
    number = rule_to_wire(RULES[rule]) if rule else sampling_pb2.RULE_UNSPECIFIED
    if isinstance(speculation, Topology):
        topology = tree_pb2.Topology(parents=speculation.parents)
        return pb.Speculation(mode=pb.SPECULATION_MODE_TREE, topology=topology, rule=number)
    if not isinstance(speculation, str) or speculation not in _MODES:
        raise InvalidArgument(f"{speculation!r} is none of 'auto', 'off', 'tree', or a Topology", "speculation")
    return pb.Speculation(mode=_MODES[speculation], rule=number)


@dataclass(slots=True)
class Answer:
    """The responses of one call so far, folded into what the caller sees."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prompt_tokens: int = 0
    generation: Generation | None = None

    def add(self, response: pb.GenerateResponse) -> Chunk:
        self.num_prompt_tokens = self.num_prompt_tokens or response.num_prompt_tokens
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
                time_to_first_token_seconds=finish.time_to_first_token_seconds,
                total_seconds=finish.total_seconds,
            ),
            speculation=_figures(finish.speculation),
            rule=rule_name(response.rule),
            seed=response.seed if response.HasField("seed") else None,
            logprobs=tuple(self.logprobs),
        )


def _logprobs_to_dict(logprobs: TokenLogprobs) -> dict[str, Any]:
    """Ready for JSON, which has no -inf: the processed logprob of a token that was cut is null."""
    top = [{"token_id": t, "raw": raw, "processed": _finite(processed)} for t, raw, processed in logprobs.top]
    return {"token_id": logprobs.token_id, "raw": logprobs.raw, "processed": _finite(logprobs.processed), "top": top}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figures(report: pb.SpeculationReport) -> SpeculationFigures:
    tree = Topology(tuple(report.topology.parents)) if report.HasField("topology") else Topology.root_only()
    stages = report.stages
    return SpeculationFigures(
        num_steps=report.num_steps,
        num_drafted_steps=report.num_drafted_steps,
        num_drafted_tokens=report.num_drafted_tokens,
        num_accepted_tokens=report.num_accepted_tokens,
        tree_size=tree.size,
        tree_levels=tree.levels,
        stage_seconds=StageSeconds(stages.draft, stages.verify, stages.network, stages.host, stages.prefill),
        offered_by_rank=tuple(report.num_offered_by_rank),
        accepted_by_rank=tuple(report.num_accepted_by_rank),
        num_fallback_steps=report.num_fallback_steps,
        fallback_reason=report.fallback_reason,
    )
