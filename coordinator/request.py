"""A client's request, checked field by field, with every default filled in."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from coordinator.conversation import conversation_from_wire
from coordinator.stops import parse_stops
from coordinator.text import TextCodec
from sequoia.errors import InvalidArgument
from sequoia.rules import COUPLED, ParameterError, Rule, choose_rule
from sequoia.sampling import MAX_STOP_TOKENS, Decoding, Sampling
from sequoia.topology import TreeShape
from sequoia.v1 import coordinator_pb2, sampling_pb2, worker_pb2
from sequoia.wire import rule_name, sampling_from_wire, shape_from_wire, tokens_from_wire

DEFAULT_MAX_TOKENS = 256
# Of a seed drawn here: every JSON reader keeps that many.
_NUM_SEED_BITS = 53


@dataclass(frozen=True)
class Request:
    """What is left of a GenerateRequest when nothing in it can be wrong any more."""

    prompt: tuple[int, ...]
    max_tokens: int
    stops: tuple[str, ...]
    decoding: Decoding
    mode: coordinator_pb2.SpeculationMode
    shape: TreeShape | None
    generated: tuple[int, ...] = ()  # tokens that the answer has already


def parse_request(
    message: coordinator_pb2.GenerateRequest,
    codec: TextCodec,
    target: worker_pb2.WorkerDescription,
    max_tree_size: int,
    default_rule: Rule,
) -> Request:
    """Raises InvalidArgument naming the first field that cannot be served. `max_tree_size` counts nodes.

    `default_rule` serves what is sampled without naming a rule or a seed.
    """
    rule, sampling = _rule_and_sampling(message, codec, target, default_rule)
    stops = parse_stops(message.stop)
    mode = message.speculation.mode or coordinator_pb2.SPECULATION_MODE_AUTO
    shape = _shape(message.speculation, mode, rule, max_tree_size)
    max_tokens = message.max_tokens if message.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_tokens == 0:
        raise InvalidArgument("must be at least 1; leave it out for the default", "max_tokens")
    if sampling.min_tokens > max_tokens:
        raise InvalidArgument(f"is {sampling.min_tokens}, more than max_tokens {max_tokens}", "sampling.min_tokens")
    prompt = _prompt(message, codec, target)
    # Generation ends at the context limit, whatever was asked for.
    max_tokens = min(max_tokens, target.context_length - len(prompt))
    generated = _generated(message, target, max_tokens)
    return Request(prompt, max_tokens, stops, Decoding(rule, sampling, len(prompt)), mode, shape, generated)


def _generated(
    message: coordinator_pb2.GenerateRequest, target: worker_pb2.WorkerDescription, max_tokens: int
) -> tuple[int, ...]:
    if not message.generated_token_ids:
        return ()
    if (count := len(message.generated_token_ids)) >= max_tokens:
        problem = f"{count} tokens are all of {max_tokens}: nothing is left"
        raise InvalidArgument(problem, "generated_token_ids")
    return tokens_from_wire(message.generated_token_ids, target.vocab_size, "generated_token_ids")


def _rule_and_sampling(
    message: coordinator_pb2.GenerateRequest,
    codec: TextCodec,
    target: worker_pb2.WorkerDescription,
    default_rule: Rule,
) -> tuple[Rule, Sampling]:
    """Both as they will be in effect: a seed drawn where the rule needs one, all tokens that end the answer named."""
    sampling = sampling_from_wire(message.sampling, target.vocab_size)
    name, seeded = rule_name(message.speculation.rule), sampling.seed is not None
    try:
        rule = choose_rule(name, greedy=sampling.greedy, seeded=seeded, default=default_rule)
    except ParameterError as error:
        group = "speculation" if error.field == "rule" else "sampling"
        raise InvalidArgument(error.message, f"{group}.{error.field}") from error
    if message.sampling.ignore_eos and sampling.json_schema is not None:
        raise InvalidArgument("goes without json_schema, by which the answer may have to end", "sampling.ignore_eos")
    if refused := sorted(sampling.given & rule.refuses):
        raise InvalidArgument(f"the rule {rule.name} cannot honour it; leave it out", f"sampling.{refused[0]}")
    seed = secrets.randbits(_NUM_SEED_BITS) if rule is COUPLED and not seeded else sampling.seed
    return rule, replace(sampling, seed=seed, stop_token_ids=_ends(message.sampling, codec))


def _ends(message: sampling_pb2.Sampling, codec: TextCodec) -> tuple[int, ...]:
    """All tokens that end the answer, ascending."""
    eos = frozenset() if message.ignore_eos else codec.eos_token_ids
    ends = tuple(sorted(eos | set(message.stop_token_ids)))
    if len(ends) > MAX_STOP_TOKENS:
        problem = f"make {len(ends)} with the model's own; at most {MAX_STOP_TOKENS} are served"
        raise InvalidArgument(problem, "sampling.stop_token_ids")
    return ends


def _shape(
    message: coordinator_pb2.Speculation, mode: coordinator_pb2.SpeculationMode, rule: Rule, max_size: int
) -> TreeShape | None:
    if mode not in coordinator_pb2.SpeculationMode.values():
        raise InvalidArgument(f"{mode} is no mode; use auto, off or tree", "speculation.mode")
    kind = message.WhichOneof("shape")
    if kind is None:
        return None
    if mode != coordinator_pb2.SPECULATION_MODE_TREE:
        raise InvalidArgument("a tree goes with mode `tree` only", f"speculation.{kind}")
    return shape_from_wire(message, rule, max_size, "speculation.")


def _prompt(
    message: coordinator_pb2.GenerateRequest, codec: TextCodec, target: worker_pb2.WorkerDescription
) -> tuple[int, ...]:
    kind = message.WhichOneof("input")
    limit = target.context_length
    # Lengths are looked at before anything is copied, rendered or tokenised.
    if kind == "text":
        prompt = codec.encode(message.text, limit)
    elif kind == "chat":
        _check_count(len(message.chat.messages), limit, "chat", "messages")
        prompt = codec.encode_chat(conversation_from_wire(message.chat), limit)
    elif kind == "token_ids":
        _check_count(len(message.token_ids.ids), limit, "token_ids", "tokens")
        prompt = tuple(message.token_ids.ids)
    else:
        raise InvalidArgument("one of text, chat and token_ids is needed", "input")
    if not prompt:
        raise InvalidArgument("the prompt has no tokens; give at least one", kind)
    if max(prompt) >= target.vocab_size:
        raise InvalidArgument(f"token id {max(prompt)} is outside the vocabulary", kind)
    _check_count(len(prompt), limit, kind, "tokens")
    return prompt


def _check_count(count: int, context_length: int, field: str, what: str) -> None:
    if count >= context_length:
        problem = f"the prompt has {count} {what} and the context {context_length}"
        raise InvalidArgument(f"{problem}; shorten it to at most {context_length - 1}", field)
