"""Domain values <-> protobuf. Everything that comes off the wire is checked here, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import numpy as np

from sequoia.errors import InvalidArgument
from sequoia.hardware import LatencyCurve, LatencyProfile, SharedCurve
from sequoia.rules import RULES, ParameterError, Rule
from sequoia.sampling import MAX_LOGIT_BIASES, MAX_STOP_TOKENS, PARAMETERS, Decoding, Sampling
from sequoia.topology import DraftDistributions, DynamicShape, TokenLogprobs, TokenTree, Topology, TreeShape, Verdict
from sequoia.v1 import coordinator_pb2, draft_pb2, sampling_pb2, tree_pb2, verify_pb2, worker_pb2

MAX_DRAFT_WIDTH = 1024
_OPTIONAL = tuple(name for name in PARAMETERS if name not in ("logit_bias", "stop_token_ids"))


def topology_from_wire(message: tree_pb2.Topology, max_size: int, field: str = "topology") -> Topology:
    """Raises InvalidArgument naming `field`."""
    if len(message.parents) > max_size:
        raise InvalidArgument(f"it has {len(message.parents)} nodes; at most {max_size} are served", field)
    try:
        return Topology.of(tuple(message.parents))
    except ValueError as error:
        raise InvalidArgument(str(error), field) from error


def dynamic_from_wire(message: tree_pb2.DynamicShape, max_size: int, field: str = "dynamic") -> DynamicShape:
    """Raises InvalidArgument naming `field`, or a field of it."""
    if not 2 <= message.size <= max_size:
        raise InvalidArgument(f"is {message.size}; it must be in 2..{max_size}", f"{field}.size")
    try:
        shape = _dynamic(message)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        raise InvalidArgument(str(error), f"{field}.{name}") from error
    if shape.num_rows >= max_size:
        rows = f"{shape.num_rows} rows with these levels; there are {max_size - 1}"
        raise InvalidArgument(f"is {shape.width} and takes {rows}", f"{field}.width")
    return shape


def shape_from_wire(
    message: draft_pb2.DraftStep | coordinator_pb2.Speculation, rule: Rule, max_size: int, group: str = ""
) -> TreeShape:
    """Of a message that has one of both kinds. Raises InvalidArgument naming the field, in `group`."""
    if message.WhichOneof("shape") != "dynamic":
        return topology_from_wire(message.topology, max_size, f"{group}topology")
    if not rule.takes_any_shape:
        reason = f"{rule.name} is exact only with a shape that is known before the draws; give a topology"
        raise InvalidArgument(reason, f"{group}dynamic")
    return dynamic_from_wire(message.dynamic, max_size, f"{group}dynamic")


def known_shape(message: coordinator_pb2.TreeUsage | coordinator_pb2.RealisedPace) -> TreeShape:
    """Of a message from a part that has checked it."""
    if message.WhichOneof("shape") == "dynamic":
        return _dynamic(message.dynamic)
    return Topology.of(tuple(message.topology.parents))


def shape_to_wire(shape: TreeShape) -> dict[str, Any]:
    """The field that says it, in each message that has a shape."""
    if isinstance(shape, Topology):
        return {"topology": tree_pb2.Topology(parents=shape.parents)}
    return {"dynamic": tree_pb2.DynamicShape(**shape.to_dict())}


def _dynamic(message: tree_pb2.DynamicShape) -> DynamicShape:
    return DynamicShape(*(getattr(message, each.name) for each in fields(DynamicShape)))


def tree_from_wire(message: tree_pb2.TokenTree, max_size: int, vocab_size: int) -> TokenTree:
    """Raises InvalidArgument naming the field."""
    topology = topology_from_wire(message.topology, max_size)
    if len(message.token_ids) != topology.size:
        problem = f"{len(message.token_ids)} token ids for {topology.size} nodes; one per node is needed"
        raise InvalidArgument(problem, "tree.token_ids")
    token_ids = tokens_from_wire(message.token_ids, vocab_size, "tree.token_ids")
    q = _q_from_wire(message.q, topology, token_ids, vocab_size) if message.HasField("q") else None
    return TokenTree(topology, token_ids, q)


def tree_to_wire(tree: TokenTree) -> tree_pb2.TokenTree:
    """The flat message; q only when the tree has one."""
    message = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=tree.topology.parents), token_ids=tree.token_ids)
    if tree.q is not None:
        message.q.width = tree.q.token_ids.shape[1]
        message.q.token_ids = tree.q.token_ids.astype("<u4").tobytes()
        message.q.weights = (tree.q.weights.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return message


def tokens_from_wire(token_ids: Sequence[int], vocab_size: int, field: str) -> tuple[int, ...]:
    """At least one id, each below `vocab_size`. Raises InvalidArgument naming `field`."""
    if not token_ids:
        raise InvalidArgument("at least one token id is needed", field)
    if (largest := max(token_ids)) >= vocab_size:
        raise InvalidArgument(f"token id {largest} is outside the vocabulary of {vocab_size} tokens", field)
    return tuple(token_ids)


def sampling_from_wire(message: sampling_pb2.Sampling, vocab_size: int) -> Sampling:
    """The parameters with every default filled in. Raises InvalidArgument naming the field."""
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    for name, most in (("logit_bias", MAX_LOGIT_BIASES), ("stop_token_ids", MAX_STOP_TOKENS)):
        if (count := len(getattr(message, name))) > most:
            raise InvalidArgument(f"has {count} entries; at most {most} are served", f"sampling.{name}")
    biases, stops = tuple(sorted(message.logit_bias.items())), tuple(message.stop_token_ids)
    for name, ids in (("logit_bias", [token_id for token_id, _ in biases]), ("stop_token_ids", stops)):
        if ids:
            tokens_from_wire(ids, vocab_size, f"sampling.{name}")
    try:
        return Sampling(**given, logit_bias=biases, stop_token_ids=stops)
    except ParameterError as error:
        raise InvalidArgument(error.message, f"sampling.{error.field}") from error


def sampling_to_wire(sampling: Sampling) -> sampling_pb2.Sampling:
    """Every parameter, defaults spelled out."""
    given = {name: value for name in _OPTIONAL if (value := getattr(sampling, name)) is not None}
    return sampling_pb2.Sampling(**given, logit_bias=dict(sampling.logit_bias), stop_token_ids=sampling.stop_token_ids)


def rule_from_wire(value: sampling_pb2.Rule, field: str) -> Rule:
    """Raises InvalidArgument naming `field` for a number that is no rule."""
    rule = RULES.get(rule_name(value))
    if rule is None:
        raise InvalidArgument(f"{value} is no rule that is known here; use one of {', '.join(RULES)}", field)
    return rule


def rule_name(value: sampling_pb2.Rule) -> str:
    """Its name in `sequoia.rules`; "" when not set, and the bare number when unknown."""
    if value == sampling_pb2.RULE_UNSPECIFIED:
        return ""
    known = value in sampling_pb2.Rule.values()
    return sampling_pb2.Rule.Name(value).removeprefix("RULE_").lower() if known else str(value)


def rule_to_wire(rule: Rule) -> sampling_pb2.Rule:
    """Its number."""
    return cast(sampling_pb2.Rule, sampling_pb2.Rule.Value(f"RULE_{rule.name.upper()}"))


def decoding_from_wire(message: draft_pb2.DraftOpen | verify_pb2.VerifyOpen, vocab_size: int) -> Decoding:
    """What an opening says of the session, beside its tokens. Raises InvalidArgument naming the field."""
    rule, sampling = rule_from_wire(message.rule, "rule"), sampling_from_wire(message.sampling, vocab_size)
    if rule.greedy != sampling.greedy:
        raise InvalidArgument(f"{rule.name} does not serve temperature {sampling.temperature:g}", "rule")
    if rule.children == "coupled" and sampling.seed is None:
        raise InvalidArgument(f"{rule.name} needs one", "sampling.seed")
    if not 1 <= message.num_prompt_tokens <= len(message.token_ids):
        known = f"{message.num_prompt_tokens} of {len(message.token_ids)} tokens"
        raise InvalidArgument(f"{known}; it must count at least one and at most all", "num_prompt_tokens")
    return Decoding(rule, sampling, message.num_prompt_tokens)


def verdict_to_wire(verdict: Verdict) -> verify_pb2.Verdict:
    """With logprobs when it has them."""
    return verify_pb2.Verdict(
        accepted_nodes=verdict.accepted_nodes,
        bonus_token_id=verdict.bonus_token_id,
        logprobs=[_logprobs_to_wire(each) for each in verdict.logprobs],
    )


def logprobs_from_wire(message: sampling_pb2.TokenLogprobs) -> TokenLogprobs:
    """The value."""
    top = tuple((each.token_id, each.raw, each.processed) for each in message.top)
    top_bytes = tuple(each.token_bytes for each in message.top)
    return TokenLogprobs(message.token_id, message.raw, message.processed, top, message.token_bytes, top_bytes)


def profile_to_wire(profile: LatencyProfile) -> list[worker_pb2.LatencyCurve]:
    """The base curve first."""
    return [
        worker_pb2.LatencyCurve(
            num_tokens=each.curve.num_tokens,
            seconds=each.curve.seconds,
            num_sessions=each.num_sessions,
            num_context_tokens=each.num_context_tokens,
        )
        for each in (profile.base, *profile.others)
    ]


def profile_from_wire(messages: Sequence[worker_pb2.LatencyCurve]) -> LatencyProfile:
    """Raises ValueError when a curve cannot be right, or there is none."""
    if not messages:
        raise ValueError("a worker without a latency curve")
    base, *others = map(_curve_from_wire, messages)
    return LatencyProfile(base, tuple(others))


def _curve_from_wire(message: worker_pb2.LatencyCurve) -> SharedCurve:
    curve = LatencyCurve(tuple(message.num_tokens), tuple(message.seconds))
    return SharedCurve(message.num_sessions, message.num_context_tokens, curve)


def _logprobs_to_wire(logprobs: TokenLogprobs) -> sampling_pb2.TokenLogprobs:
    top = [sampling_pb2.TopLogprob(token_id=t, raw=raw, processed=own) for t, raw, own in logprobs.top]
    return sampling_pb2.TokenLogprobs(
        token_id=logprobs.token_id, raw=logprobs.raw, processed=logprobs.processed, top=top
    )


def _q_from_wire(
    message: tree_pb2.DraftDistributions, topology: Topology, token_ids: tuple[int, ...], vocab_size: int
) -> DraftDistributions:
    rows, width = len(topology.internal_nodes), message.width
    if not 0 < width <= MAX_DRAFT_WIDTH:
        raise InvalidArgument(f"width is {width}; it must be in 1..{MAX_DRAFT_WIDTH}", "tree.q.width")
    if len(message.token_ids) != 4 * rows * width or len(message.weights) != 2 * rows * width:
        raise InvalidArgument(f"{rows} rows of {width} columns are needed", "tree.q")
    weights = (np.frombuffer(message.weights, "<u2").astype("<u4") << 16).view("<f4").reshape(rows, width)
    q = DraftDistributions(np.frombuffer(message.token_ids, "<u4").reshape(rows, width), weights)
    if not ((weights >= 0.0) & (weights <= 1.0)).all():
        raise InvalidArgument("a weight is not a number from 0 to 1", "tree.q.weights")
    if rows and int(q.token_ids.max()) >= vocab_size:
        raise InvalidArgument(f"a token id is outside the vocabulary of {vocab_size} tokens", "tree.q.token_ids")
    for row, node in enumerate(topology.internal_nodes):
        _check_row(q, row, [token_ids[child] for child in topology.children[node]])
    return q


def _check_row(q: DraftDistributions, row: int, drawn: list[int]) -> None:
    """Children must be distinct tokens of q's support, and q must not name a token twice."""
    support = q.token_ids[row][q.weights[row] > 0].tolist()
    if len(set(support)) != len(support):
        raise InvalidArgument(f"row {row} names a token twice", "tree.q.token_ids")
    if len(set(drawn)) != len(drawn) or not set(drawn) <= set(support):
        raise InvalidArgument(f"row {row}: the children must be distinct tokens with a weight above 0", "tree.q")
