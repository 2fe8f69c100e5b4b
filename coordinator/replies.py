"""Whether a worker's reply can be one to what was asked: what cannot counts as lost, and never becomes text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sequoia.topology import Topology
from sequoia.v1 import draft_pb2, sampling_pb2, tree_pb2, verify_pb2
from sequoia.wire import MAX_DRAFT_WIDTH

# On the wire: 4 of its id, 2 of its weight.
_BYTES_OF_A_CANDIDATE = 6


def has_times(response: draft_pb2.DraftResponse | verify_pb2.VerifyResponse) -> bool:
    """Whether its times are durations."""
    times = response.worker_seconds, response.times.forwards, response.times.work
    return all(0.0 <= each < math.inf for each in times)


def is_tree(tree: tree_pb2.TokenTree, most: int) -> bool:
    """Whether it is a tree of at most so many nodes, with no more of q than they can have."""
    parents = tree.topology.parents
    if len(parents) != len(tree.token_ids) or len(parents) > most:
        return False
    if len(tree.q.token_ids) + len(tree.q.weights) > len(parents) * MAX_DRAFT_WIDTH * _BYTES_OF_A_CANDIDATE:
        return False
    try:
        Topology.of(tuple(parents))
    except ValueError:
        return False
    return True


def is_verdict(
    verdict: verify_pb2.Verdict, parents: Sequence[int], vocab_size: int, *, num_logprobs: int | None
) -> bool:
    """Whether it accepts a path of the tree with these parents (none: of a plain step), and tokens that there are.

    Every token has logprobs with at most `num_logprobs` others beside it, or, for None, no token has.
    """
    behind = 0
    for node in verdict.accepted_nodes:
        if node >= len(parents) or parents[node] != behind:
            return False
        behind = node
    num_told = 0 if num_logprobs is None else len(verdict.accepted_nodes) + 1
    if verdict.bonus_token_id >= vocab_size or len(verdict.logprobs) != num_told:
        return False
    return all(_is_told(each, vocab_size, num_logprobs or 0) for each in verdict.logprobs)


def _is_told(told: sampling_pb2.TokenLogprobs, vocab_size: int, most: int) -> bool:
    if len(told.top) > most:
        return False
    ids = (told.token_id, *(each.token_id for each in told.top))
    # The coordinator writes what they stand for.
    has_bytes = told.token_bytes or any(each.token_bytes for each in told.top)
    return max(ids) < vocab_size and not has_bytes
