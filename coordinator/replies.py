"""Whether a worker's reply can be one to what was asked: what cannot counts as lost, and never becomes text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sequoia.topology import Topology
from sequoia.v1 import draft_pb2, tree_pb2, verify_pb2


def has_times(response: draft_pb2.DraftResponse | verify_pb2.VerifyResponse) -> bool:
    """Whether its times are durations."""
    times = response.worker_seconds, response.times.forwards, response.times.work
    return all(0.0 <= each < math.inf for each in times)


def is_tree(tree: tree_pb2.TokenTree, most: int) -> bool:
    """Whether it is a tree of at most so many nodes."""
    parents = tree.topology.parents
    if len(parents) != len(tree.token_ids) or len(parents) > most:
        return False
    try:
        Topology.of(tuple(parents))
    except ValueError:
        return False
    return True


def is_verdict(verdict: verify_pb2.Verdict, parents: Sequence[int], vocab_size: int, *, has_logprobs: bool) -> bool:
    """Whether it accepts a path of the tree with these parents (none: of a plain step), and tokens that there are."""
    behind = 0
    for node in verdict.accepted_nodes:
        if node >= len(parents) or parents[node] != behind:
            return False
        behind = node
    num_logprobs = len(verdict.accepted_nodes) + 1 if has_logprobs else 0
    return verdict.bonus_token_id < vocab_size and len(verdict.logprobs) == num_logprobs
