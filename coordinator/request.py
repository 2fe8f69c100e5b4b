"""A client's request, checked field by field, with every default filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordinator.text import TextCodec, parse_stops
from sequoia.errors import InvalidArgument
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2, sampling_pb2, worker_pb2

DEFAULT_MAX_TOKENS = 256
_MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Request:
    """What is left of a GenerateRequest when nothing in it can be wrong any more."""

    prompt: tuple[int, ...]
    max_tokens: int
    stops: tuple[str, ...]
    sampling: sampling_pb2.Sampling
    mode: coordinator_pb2.SpeculationMode
    topology: Topology | None

    @property
    def rule(self) -> sampling_pb2.Rule:
        """The rule that serves this temperature."""
        return sampling_pb2.RULE_SEQUOIA if self.sampling.temperature > 0.0 else sampling_pb2.RULE_GREEDY


def parse_request(
    message: coordinator_pb2.GenerateRequest,
    codec: TextCodec,
    target: worker_pb2.WorkerDescription,
    max_tree_size: int,
) -> Request:
    """Raises InvalidArgument naming the first field that cannot be served. `max_tree_size` counts nodes."""
    sampling = _sampling(message.sampling)
    stops = parse_stops(message.stop)
    mode = message.speculation.mode or coordinator_pb2.SPECULATION_MODE_AUTO
    topology = _topology(message.speculation, mode, max_tree_size)
    if message.HasField("max_tokens") and message.max_tokens == 0:
        raise InvalidArgument("must be at least 1; leave it out for the default", "max_tokens")
    prompt = _prompt(message, codec, target)
    # Generation ends at the context limit, whatever was asked for.
    room = target.context_length - len(prompt)
    max_tokens = min(message.max_tokens or DEFAULT_MAX_TOKENS, room)
    return Request(prompt, max_tokens, stops, sampling, mode, topology)


def _sampling(message: sampling_pb2.Sampling) -> sampling_pb2.Sampling:
    if message.HasField("seed"):
        raise InvalidArgument("seeded sampling is not served yet; leave the seed out", "sampling.seed")
    temperature = message.temperature if message.HasField("temperature") else 1.0
    if not (math.isfinite(temperature) and 0.0 <= temperature <= _MAX_TEMPERATURE):
        remedy = f"is {temperature:g}; it must be from 0 (greedy) to {_MAX_TEMPERATURE:g}"
        raise InvalidArgument(remedy, "sampling.temperature")
    top_p = message.top_p if message.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidArgument(f"is {top_p:g}; it must be above 0 and at most 1", "sampling.top_p")
    return sampling_pb2.Sampling(temperature=temperature, top_p=top_p, top_k=message.top_k)


def _topology(
    message: coordinator_pb2.Speculation, mode: coordinator_pb2.SpeculationMode, max_size: int
) -> Topology | None:
    field = "speculation.topology"
    if mode not in coordinator_pb2.SpeculationMode.values():
        raise InvalidArgument(f"{mode} is no mode; use auto, off or tree", "speculation.mode")
    if not message.HasField("topology"):
        return None
    if mode != coordinator_pb2.SPECULATION_MODE_TREE:
        raise InvalidArgument("a tree goes with mode `tree` only", field)
    if len(message.topology.parents) > max_size:
        raise InvalidArgument(f"{len(message.topology.parents)} nodes; the pair takes at most {max_size}", field)
    try:
        return Topology(tuple(message.topology.parents))
    except ValueError as error:
        raise InvalidArgument(str(error), field) from error


def _prompt(
    message: coordinator_pb2.GenerateRequest, codec: TextCodec, target: worker_pb2.WorkerDescription
) -> tuple[int, ...]:
    kind = message.WhichOneof("input")
    if kind == "text":
        prompt = codec.encode(message.text)
    elif kind == "chat":
        prompt = codec.encode_chat([(each.role, each.content) for each in message.chat.messages])
    elif kind == "token_ids":
        prompt = tuple(message.token_ids.ids)
    else:
        raise InvalidArgument("one of text, chat and token_ids is needed", "input")
    if not prompt:
        raise InvalidArgument("the prompt has no tokens; give at least one", kind)
    if max(prompt) >= target.padded_vocab_size:
        raise InvalidArgument(f"token id {max(prompt)} is outside the vocabulary", kind)
    if len(prompt) >= target.context_length:
        limit = target.context_length
        remedy = f"the prompt has {len(prompt)} tokens and the context {limit}; shorten it to at most {limit - 1}"
        raise InvalidArgument(remedy, kind)
    return prompt
