"""What goes into a request and what comes out of it: the values of the client, and their wire form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from google.protobuf.message import Message as ProtoMessage

from sequoia.errors import Internal, InvalidArgument
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import tree_pb2


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
Speculation: TypeAlias = Literal["auto", "off", "tree"] | Topology
Stop: TypeAlias = Sequence[str | bytes]


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
    """A finished answer. `token_ids` holds the end-of-sequence token, `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    speculation: SpeculationFigures

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: text, token_ids, finish_reason, usage, speculation."""
        speculation = asdict(self.speculation)
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
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


def build_request(
    prompt: Prompt,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: Stop,
    speculation: Speculation,
) -> pb.GenerateRequest:
    """The wire form of a request; what is None is left out. Raises InvalidArgument naming the argument."""
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    _set(request, "max_tokens", max_tokens, "a whole number from 1 to 2**32 - 1")
    _set(request.sampling, "temperature", temperature, "a number")
    _set(request.sampling, "top_p", top_p, "a number")
    _set(request.sampling, "top_k", top_k, "a whole number from 0 to 2**32 - 1")
    _set(request.sampling, "seed", seed, "a whole number from 0 to 2**64 - 1")
    _set_stop(request, stop)
    request.speculation.CopyFrom(_speculation(speculation))
    return request


def _set(message: ProtoMessage, name: str, value: float | None, expected: str) -> None:
    if value is None:
        return
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{value!r} is not {expected}", name) from error


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


def _speculation(speculation: Speculation) -> pb.Speculation:
    if isinstance(speculation, Topology):
        topology = tree_pb2.Topology(parents=speculation.parents)
        return pb.Speculation(mode=pb.SPECULATION_MODE_TREE, topology=topology)
    if not isinstance(speculation, str) or speculation not in _MODES:
        raise InvalidArgument(f"{speculation!r} is none of 'auto', 'off', 'tree', or a Topology", "speculation")
    return pb.Speculation(mode=_MODES[speculation])


@dataclass(slots=True)
class Answer:
    """The responses of one call so far, folded into what the caller sees."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    generation: Generation | None = None

    def add(self, response: pb.GenerateResponse) -> Chunk:
        self.num_prompt_tokens = self.num_prompt_tokens or response.num_prompt_tokens
        self.text += response.text
        self.token_ids += response.token_ids
        if response.HasField("finish"):
            self.generation = self._finish(response.finish)
        return Chunk(response.text, tuple(response.token_ids), self.generation)

    def finished(self) -> Generation:
        if self.generation is None:
            raise Internal("the coordinator ended the answer without saying how it finished")
        return self.generation

    def _finish(self, finish: pb.Finish) -> Generation:
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
        )


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
