"""Tensors and domain values <-> protobuf. Everything that comes off the wire is checked here, by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sequoia.engine.sampling import Sampling
from sequoia.errors import InvalidArgument
from sequoia.topology import DraftDistributions, TokenTree, Topology
from sequoia.v1 import sampling_pb2, tree_pb2

MAX_DRAFT_WIDTH = 1024


def topology_from_wire(message: tree_pb2.Topology, max_size: int) -> Topology:
    """Raises InvalidArgument naming `topology.parents`."""
    if len(message.parents) > max_size:
        raise InvalidArgument(f"{len(message.parents)} nodes; this worker takes at most {max_size}", "topology.parents")
    try:
        return Topology(tuple(message.parents))
    except ValueError as error:
        raise InvalidArgument(str(error), "topology.parents") from error


def tree_from_wire(message: tree_pb2.TokenTree, max_size: int, vocab_size: int) -> TokenTree:
    """Raises InvalidArgument naming the field."""
    topology = topology_from_wire(message.topology, max_size)
    token_ids = tokens_from_wire(message.token_ids, vocab_size, "tree.token_ids")
    q = _q_from_wire(message.q, topology, token_ids, vocab_size) if message.HasField("q") else None
    try:
        return TokenTree(topology, token_ids, q)
    except ValueError as error:
        raise InvalidArgument(str(error), "tree.token_ids") from error


def tree_to_wire(tree: TokenTree) -> tree_pb2.TokenTree:
    """The flat message; q only when the tree has one."""
    message = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=tree.topology.parents), token_ids=tree.token_ids)
    if tree.q is not None:
        message.q.width = tree.q.token_ids.shape[1]
        message.q.token_ids = tree.q.token_ids.astype("<u4").tobytes()
        message.q.weights = tree.q.weights.astype("<u2").tobytes()
    return message


def tokens_from_wire(token_ids: Sequence[int], vocab_size: int, field: str) -> tuple[int, ...]:
    """At least one id, each below `vocab_size`. Raises InvalidArgument naming `field`."""
    if not token_ids:
        raise InvalidArgument("at least one token id is needed", field)
    if (largest := max(token_ids)) >= vocab_size:
        raise InvalidArgument(f"token id {largest} is outside the vocabulary of {vocab_size} tokens", field)
    return tuple(token_ids)


def sampling_from_wire(message: sampling_pb2.Sampling, rule: sampling_pb2.Rule) -> Sampling:
    """The parameters a worker goes by; the coordinator has filled in every default. Raises InvalidArgument."""
    sampling = Sampling(message.temperature, message.top_p, message.top_k)
    expected = sampling_pb2.RULE_GREEDY if sampling.greedy else sampling_pb2.RULE_SEQUOIA
    if rule != expected:
        named = sampling_pb2.Rule.Name(expected)
        raise InvalidArgument(f"temperature {sampling.temperature} is served by {named} on this worker", "rule")
    if not (0.0 <= sampling.temperature <= 100.0 and 0.0 < sampling.top_p <= 1.0):
        raise InvalidArgument("temperature must be in 0..100 and top_p in (0, 1]", "sampling")
    return sampling


def _q_from_wire(
    message: tree_pb2.DraftDistributions, topology: Topology, token_ids: tuple[int, ...], vocab_size: int
) -> DraftDistributions:
    rows, width = len(topology.internal_nodes), message.width
    if not 0 < width <= MAX_DRAFT_WIDTH:
        raise InvalidArgument(f"width is {width}; it must be in 1..{MAX_DRAFT_WIDTH}", "tree.q.width")
    if len(message.token_ids) != 4 * rows * width or len(message.weights) != 2 * rows * width:
        raise InvalidArgument(f"{rows} rows of {width} columns are needed", "tree.q")
    q = DraftDistributions(
        np.frombuffer(message.token_ids, "<u4").reshape(rows, width),
        np.frombuffer(message.weights, "<u2").reshape(rows, width),
    )
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
