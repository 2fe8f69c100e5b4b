"""Speculation that is switched off and on again within a request: the text is the same, the draft is right again."""

from __future__ import annotations

import asyncio
import time

import pytest
from conftest import System

from coordinator.draft_stream import DraftStream
from coordinator.pool import Pool
from coordinator.stream import Opening
from sequoia.client import Generation
from sequoia.rules import GREEDY
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import Topology
from sequoia.v1 import draft_pb2
from sequoia.v1.worker_pb2 import WORKER_ROLE_DRAFT

PROMPT = list(range(40, 70))
TREE = Topology((-1, 0, 0, 1, 1, 3))


@pytest.fixture(scope="module")
def undisturbed(tiny_system: System) -> Generation:
    return tiny_system.client.generate(PROMPT, max_tokens=600, temperature=0, ignore_eos=True, speculation="off")


def test_a_governed_answer_is_the_plain_one_however_often_it_changes_its_gait(
    tiny_system: System, undisturbed: Generation
) -> None:
    governed = [tiny_system.client.generate(PROMPT, max_tokens=600, temperature=0, ignore_eos=True) for _ in range(3)]
    assert {each.token_ids for each in governed} == {undisturbed.token_ids}
    sizes = {usage.shape.size for each in governed for usage in each.speculation.trees}
    assert {1, 8} <= sizes
    assert {each.speculation.state for each in governed} <= {"on", "reduced", "off"}
    assert all(each.speculation.state_reason for each in governed)


def test_a_request_that_says_how_to_speculate_is_not_governed(undisturbed: Generation) -> None:
    assert (undisturbed.speculation.state, undisturbed.speculation.state_reason) == ("", "")
    assert [usage.shape.size for usage in undisturbed.speculation.trees] == [1]


def test_bytes_to_both_workers_are_counted(tiny_system: System, undisturbed: Generation) -> None:
    figures = tiny_system.client.generate(PROMPT, max_tokens=60, temperature=0, speculation=TREE).speculation
    assert undisturbed.speculation.num_draft_bytes == 0
    assert figures.num_draft_bytes > 4 * figures.num_drafted_tokens / 4
    assert figures.num_verify_bytes > figures.num_drafted_tokens


async def tree(stream: DraftStream, committed: list[int]) -> draft_pb2.DraftResponse:
    """Opens the session if need be, which takes its time."""
    async with asyncio.timeout(20):
        response = await stream.tree_or_none(committed, TREE)
        while response is None:
            await asyncio.sleep(0.01)
            response = await stream.tree_or_none(committed, TREE)
    return response


async def test_the_draft_catches_up_after_an_off_period(tiny_system: System, undisturbed: Generation) -> None:
    text = [*PROMPT, *undisturbed.token_ids]
    pool = Pool([tiny_system.deployment.processes["draft"].address], WORKER_ROLE_DRAFT, lambda found: None)
    [member] = pool.members
    description = (await pool.meet(member, 10.0)).worker
    opening = Opening(Decoding(GREEDY, Sampling(temperature=0.0), len(PROMPT)), 2000, time.monotonic() + 60.0)
    off_for_a_while, fresh = (
        DraftStream(pool, opening, 20.0, verify_device_id=description.device_id) for _ in range(2)
    )
    await tree(off_for_a_while, text[:40])
    late = await off_for_a_while.tree_or_none(text[:400], TREE)
    assert late is not None
    assert list(late.tree.token_ids) == list((await tree(fresh, text[:400])).tree.token_ids)
    off_for_a_while.close()
    fresh.close()
    assert member.num_sessions == 0
    await member.link.channel.close()


def test_explain_tells_what_was_realised(tiny_system: System, undisturbed: Generation) -> None:
    tiny_system.client.generate(PROMPT, max_tokens=60, temperature=0, ignore_eos=True)
    explained = tiny_system.client.explain()
    assert explained.situation.startswith("greedy, temperature 0, 1 sessions, 1024 tokens of context")
    assert explained.plan_json == ""
    paces = {tuple(each.topology.parents): each for each in explained.realised}
    assert paces[(-1,)].num_tokens == pytest.approx(paces[(-1,)].num_steps)
    assert all(each.seconds > 0 for each in explained.realised)


def test_explain_refuses_what_no_request_can_have(tiny_system: System) -> None:
    from sequoia.errors import InvalidArgument

    with pytest.raises(InvalidArgument, match="temperature"):
        tiny_system.client.explain(temperature=-1.0)
    with pytest.raises(InvalidArgument, match="rule"):
        tiny_system.client.explain(temperature=0.0, rule="sequoia")


async def test_workers_describe_a_profile_of_their_hardware(tiny_system: System) -> None:
    from sequoia.wire import profile_from_wire

    pair = tiny_system.client.describe_pair()
    for worker in (pair.verify, pair.draft):
        profile = profile_from_wire(worker.latencies)
        assert (profile.base.num_sessions, profile.base.curve.num_tokens[0]) == (1, 1)
        assert profile.base.curve.max_tokens == worker.max_tree_size
        assert {each.num_sessions for each in profile.others} == {1, 2, 4, 8} - (
            {1} if worker.context_length < 2048 else set()
        )
    assert pair.verify.device_id == pair.draft.device_id
