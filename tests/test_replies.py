"""What a worker cannot have meant: by cases, against a definition in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest

from coordinator.replies import has_times, is_tree, is_verdict
from sequoia.topology import Topology
from sequoia.v1 import sampling_pb2, tree_pb2, verify_pb2

PARENTS = (-1, 0, 0, 1, 1, 2)


def paths(parents: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Of every node the way from the root, the root left out."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    for node, parent in enumerate(parents[1:], start=1):
        found[node] = (*found[parent], node)
    return set(found.values())


def verdict(*nodes: int, bonus: int = 7, num_logprobs: int = 0) -> verify_pb2.Verdict:
    logprobs = num_logprobs * [sampling_pb2.TokenLogprobs()]
    return verify_pb2.Verdict(accepted_nodes=nodes, bonus_token_id=bonus, logprobs=logprobs)


def test_what_is_accepted_is_a_path_of_the_tree() -> None:
    tried = [nodes for count in range(4) for nodes in itertools.product(range(8), repeat=count)]
    found = {nodes for nodes in tried if is_verdict(verdict(*nodes), PARENTS, 400, num_logprobs=None)}
    assert found == paths(PARENTS)


def test_a_plain_step_accepts_nothing() -> None:
    assert is_verdict(verdict(), (), 400, num_logprobs=None)
    assert not is_verdict(verdict(0), (), 400, num_logprobs=None)


def test_the_bonus_token_is_one_of_the_vocabulary() -> None:
    assert is_verdict(verdict(bonus=399), (), 400, num_logprobs=None)
    assert not is_verdict(verdict(bonus=400), (), 400, num_logprobs=None)


@pytest.mark.parametrize("count", range(4))
def test_there_are_logprobs_for_every_token_or_for_none(count: int) -> None:
    assert is_verdict(verdict(1, num_logprobs=count), PARENTS, 400, num_logprobs=0) == (count == 2)
    assert is_verdict(verdict(1, num_logprobs=count), PARENTS, 400, num_logprobs=None) == (count == 0)


@pytest.mark.parametrize(("num_top", "token_id", "is_one"), [(3, 399, True), (4, 0, False), (3, 400, False)])
def test_beside_a_token_stand_as_many_as_were_asked_for_and_known_ones(
    num_top: int, token_id: int, is_one: bool
) -> None:
    told = sampling_pb2.TokenLogprobs(top=num_top * [sampling_pb2.TopLogprob(token_id=token_id)])
    found = verify_pb2.Verdict(bonus_token_id=7, logprobs=[told])
    assert is_verdict(found, (), 400, num_logprobs=3) == is_one


def test_q_has_no_more_than_its_nodes_can_have() -> None:
    tree = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=(-1, 0)), token_ids=[1, 2])
    tree.q.token_ids, tree.q.weights = bytes(2 * 4 * 1024), bytes(2 * 2 * 1024)
    assert is_tree(tree, 2)
    tree.q.weights += b"0"
    assert not is_tree(tree, 2)


@pytest.mark.parametrize(
    ("parents", "num_tokens", "is_one"),
    [
        (PARENTS, 6, True),
        ((-1,), 1, True),
        (PARENTS, 5, False),
        ((), 0, False),
        ((5,), 1, False),
        ((-1, 1), 2, False),
        ((-1, 0, 1, 0), 4, False),
        ((-1, *6 * (0,)), 7, False),
    ],
)
def test_a_tree_is_one_of_no_more_nodes_than_were_asked_for(
    parents: tuple[int, ...], num_tokens: int, is_one: bool
) -> None:
    tree = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=parents), token_ids=num_tokens * [1])
    assert is_tree(tree, Topology(PARENTS).size) == is_one


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("field", ["worker_seconds", "forwards", "work"])
def test_times_are_durations(field: str, wrong: float) -> None:
    response = verify_pb2.VerifyResponse(worker_seconds=0.1)
    assert has_times(response)
    setattr(response if field == "worker_seconds" else response.times, field, wrong)
    assert not has_times(response)
