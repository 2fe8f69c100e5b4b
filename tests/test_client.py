"""The client against a real gRPC server with a scripted coordinator: what is sent, what is folded, what fails how."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from sequoia import AsyncClient, Client
from sequoia.border import Context, error_border
from sequoia.client import Chunk, Message
from sequoia.errors import Cancelled, DeadlineExceeded, Internal, InvalidArgument, SequoiaError, Unavailable
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc, tree_pb2
from sequoia.v1.sampling_pb2 import RULE_COUPLED

NEVER_AHEAD = {"ahead_hits": 0, "ahead_misses": 0, "hit_draft_seconds": 0.0, "nodes": 0, "levels_grown": 0}
STAGES = ("draft", "verify", "network", "host", "prefill", "forwards", "work", "draft_forwards", "draft_work")
PIECES = [
    pb.GenerateResponse(request_id="r1", num_prompt_tokens=5, text="Hel", token_ids=[10]),
    pb.GenerateResponse(request_id="r1", text="lo wor", token_ids=[11, 12, 13]),
    pb.GenerateResponse(
        request_id="r1",
        text="ld",
        token_ids=[14, 2],
        finish=pb.Finish(
            reason=pb.FINISH_REASON_STOP,
            num_completion_tokens=6,
            time_to_first_token_seconds=0.5,
            total_seconds=2.0,
            num_cached_prompt_tokens=0,
            speculation=pb.SpeculationReport(
                num_steps=2,
                num_drafted_steps=2,
                num_drafted_tokens=6,
                num_accepted_tokens=3,
                stages=pb.StageSeconds(draft=0.3, verify=0.6, network=0.05, host=0.05, prefill=0.4),
                counts_by_depth=[
                    pb.RankCounts(num_offered=[2, 2], num_accepted=[2]),
                    pb.RankCounts(num_offered=[2], num_accepted=[1]),
                ],
                trees=[
                    pb.TreeUsage(topology=tree_pb2.Topology(parents=[-1]), num_steps=1, num_tokens=1),
                    pb.TreeUsage(
                        topology=tree_pb2.Topology(parents=[-1, 0, 0, 1]),
                        num_steps=2,
                        num_tokens=5,
                        stages=pb.StageSeconds(draft=0.2),
                        num_ahead_hits=1,
                        num_ahead_misses=2,
                        hit_draft_seconds=0.01,
                    ),
                ],
                num_draft_bytes=100,
                num_verify_bytes=200,
                state=pb.SPECULATION_STATE_REDUCED,
                state_reason="the tree was too slow",
                num_fallback_steps=1,
                fallback_reason="draft was late",
            ),
        ),
    ),
]


class ScriptedCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers every request with `pieces`, then fails or waits if told so; remembers what it was sent."""

    def __init__(self) -> None:
        self.pieces = PIECES
        self.failure: SequoiaError | None = None
        self.hangs = False
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        try:
            async with error_border(context):
                for piece in self.pieces:
                    yield piece
                if self.failure:
                    raise self.failure
                if self.hangs:
                    await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return pb.DescribePairResponse(verify_rtt_seconds=0.001, plans_json=["{}"])


@pytest.fixture
async def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator()


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client


async def in_thread(address: str, use: Callable[[Client], Any]) -> Any:
    """The synchronous client, kept off the loop that serves it."""

    def work() -> Any:
        with Client(address) as client:
            return use(client)

    return await asyncio.to_thread(work)


async def test_pieces_fold_into_one_generation(client: AsyncClient) -> None:
    generation = await client.generate("hi")
    assert generation.text == "Hello world"
    assert generation.token_ids == (10, 11, 12, 13, 14, 2)
    assert generation.finish_reason == "stop"
    assert generation.usage.num_prompt_tokens == 5
    assert generation.usage.tokens_per_second == 3.0
    assert generation.speculation.mean_tokens_per_step == 2.5
    assert (generation.speculation.tree.size, generation.speculation.tree.levels) == (4, 3)
    assert generation.speculation.offered_by_rank == (4, 2)
    assert generation.speculation.fallback_reason == "draft was late"


async def test_both_clients_return_the_same(client: AsyncClient, address: str) -> None:
    assert await in_thread(address, lambda sync: sync.generate("hi")) == await client.generate("hi")
    chunks = [chunk async for chunk in client.stream("hi")]
    assert await in_thread(address, lambda sync: list(sync.stream("hi"))) == chunks


async def test_only_the_last_chunk_carries_the_generation(client: AsyncClient) -> None:
    chunks = [chunk async for chunk in client.stream("hi")]
    assert chunks[:2] == [Chunk("Hel", (10,)), Chunk("lo wor", (11, 12, 13))]
    assert chunks[2].generation == await client.generate("hi")


async def test_to_dict_is_what_the_command_prints(client: AsyncClient) -> None:
    assert (await client.generate("hi")).to_dict() == {
        "text": "Hello world",
        "token_ids": [10, 11, 12, 13, 14, 2],
        "finish_reason": "stop",
        "rule": "",
        "seed": None,
        "usage": {
            "num_prompt_tokens": 5,
            "num_completion_tokens": 6,
            "time_to_first_token_seconds": 0.5,
            "total_seconds": 2.0,
            "num_cached_prompt_tokens": 0,
            "time_per_output_token_seconds": 0.3,
            "tokens_per_second": 3.0,
        },
        "speculation": {
            "steps": 2,
            "mean_tokens_per_step": 2.5,
            "tree": {"size": 4, "levels": 3},
            "seconds": {
                "draft": 0.3,
                "verify": 0.6,
                "network": 0.05,
                "host": 0.05,
                "prefill": 0.4,
                "forwards": 0.0,
                "work": 0.0,
                "draft_forwards": 0.0,
                "draft_work": 0.0,
            },
            "num_drafted_steps": 2,
            "num_drafted_tokens": 6,
            "num_accepted_tokens": 3,
            "offered_by_rank": (4, 2),
            "accepted_by_rank": (3, 0),
            "draft_ahead": {"attempts": 3, "hits": 1},
            "offered": ((2, 2), (2,)),
            "accepted": ((2, 0), (1,)),
            "num_draft_bytes": 100,
            "num_verify_bytes": 200,
            "state": "reduced",
            "state_reason": "the tree was too slow",
            "trees": [
                {"parents": [-1], "steps": 1, "tokens": 1, "seconds": dict.fromkeys(STAGES, 0.0), **NEVER_AHEAD},
                {
                    "parents": [-1, 0, 0, 1],
                    "steps": 2,
                    "tokens": 5,
                    "seconds": dict.fromkeys(STAGES, 0.0) | {"draft": 0.2},
                    "ahead_hits": 1,
                    "ahead_misses": 2,
                    "hit_draft_seconds": 0.01,
                    "nodes": 0,
                    "levels_grown": 0,
                },
            ],
            "num_fallback_steps": 1,
            "fallback_reason": "draft was late",
            "num_ngram_tokens": 0,
            "num_accepted_ngram_tokens": 0,
        },
    }


async def test_no_drafted_tree_reads_as_plain_decoding(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    coordinator.pieces = [pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_LENGTH))]
    generation = await client.generate("hi")
    assert generation.finish_reason == "length"
    assert generation.speculation.mean_tokens_per_step == 0.0
    assert (generation.speculation.tree.size, generation.speculation.state) == (1, "")


async def test_what_is_left_out_is_not_sent(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    await client.generate("hi")
    (request,) = coordinator.requests
    assert request.text == "hi"
    assert not request.HasField("max_tokens")
    assert not request.sampling.ListFields()
    assert request.speculation.mode == pb.SPECULATION_MODE_AUTO


async def test_every_argument_reaches_the_server(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    await client.generate(
        [Message("user", "hi")],
        max_tokens=7,
        temperature=0,
        top_p=0.9,
        top_k=40,
        seed=2**64 - 1,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logit_bias={7: -2.5},
        stop=["é", b"\xff"],
        stop_token_ids=[3],
        ignore_eos=True,
        min_tokens=2,
        logprobs=5,
        json_schema={"const": "é"},
        rule="coupled",
        speculation=Topology((-1, 0, 0)),
    )
    (request,) = coordinator.requests
    assert (request.chat.messages[0].role, request.chat.messages[0].content) == ("user", "hi")
    assert request.max_tokens == 7
    assert request.sampling.HasField("temperature")
    assert (request.sampling.top_p, request.sampling.top_k, request.sampling.seed) == (0.9, 40, 2**64 - 1)
    assert (request.sampling.min_p, request.sampling.repetition_penalty) == (0.1, 1.2)
    assert (request.sampling.presence_penalty, request.sampling.frequency_penalty) == (0.3, 0.4)
    assert (dict(request.sampling.logit_bias), list(request.sampling.stop_token_ids)) == ({7: -2.5}, [3])
    assert (request.sampling.ignore_eos, request.sampling.min_tokens, request.sampling.num_logprobs) == (True, 2, 5)
    assert request.sampling.json_schema == '{"const": "é"}'
    assert request.speculation.rule == RULE_COUPLED
    assert list(request.stop) == ["é".encode(), b"\xff"]
    assert request.speculation.mode == pb.SPECULATION_MODE_TREE
    assert list(request.speculation.topology.parents) == [-1, 0, 0]


async def test_token_ids_are_sent_as_they_are(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    await client.generate([3, 1, 2], speculation="off")
    assert list(coordinator.requests[0].token_ids.ids) == [3, 1, 2]
    assert coordinator.requests[0].speculation.mode == pb.SPECULATION_MODE_OFF


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": b"bytes"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": [1, Message("user", "hi")]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [Message("user", 1)]}, "prompt"),  # type: ignore[arg-type]
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": []}, "top_p"),
        ({"top_k": 2**32}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"stop": "one string"}, "stop"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"min_p": "x"}, "min_p"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": 5}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"json_schema": {"const": b"bytes"}}, "json_schema"),
        ({"json_schema": "\ud800"}, "json_schema"),
        ({"logprobs": -1}, "logprobs"),
        ({"rule": "specinfer"}, "rule"),
        ({"temprature": 1}, "temprature"),
        ({"speculation": "on"}, "speculation"),
        ({"speculation": [-1, 0]}, "speculation"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": "soon"}, "timeout_seconds"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named_before_anything_is_sent(arguments: dict[str, Any], field: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument) as raised:
        client.stream(**{"prompt": "hi", **arguments})
    assert raised.value.field == field


async def test_the_servers_refusal_keeps_its_field(
    client: AsyncClient, coordinator: ScriptedCoordinator, address: str
) -> None:
    coordinator.pieces, coordinator.failure = [], InvalidArgument("must not be negative", "temperature")
    with pytest.raises(InvalidArgument, match="temperature: must not be negative") as raised:
        await client.generate("hi", temperature=-1)
    assert raised.value.field == "temperature"
    with pytest.raises(InvalidArgument) as raised:
        await in_thread(address, lambda sync: sync.generate("hi", temperature=-1))
    assert raised.value.field == "temperature"


async def test_a_failure_after_some_text_arrives_after_that_text(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    coordinator.pieces, coordinator.failure = PIECES[:1], Unavailable("the verify worker is gone")
    stream = client.stream("hi")
    assert (await anext(stream)).text == "Hel"
    with pytest.raises(Unavailable, match="the verify worker is gone"):
        await anext(stream)


async def test_an_answer_without_a_finish_is_an_error(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    coordinator.pieces = PIECES[:2]
    with pytest.raises(Internal, match="without saying how it finished"):
        await client.generate("hi")


async def test_a_piece_that_comes_twice_is_noticed_and_the_answer_goes_on_behind_the_first(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    first = pb.GenerateResponse(text="Hel", token_ids=[10], num_tokens_before=0, rule=RULE_COUPLED, seed=9)
    rest = [pb.GenerateResponse.FromString(each.SerializeToString()) for each in PIECES[1:]]
    for number, piece in zip((1, 4), rest, strict=True):
        piece.num_tokens_before = number
    coordinator.pieces = [first, first]
    pieces = client.stream("hi", temperature=0.5)
    assert (await anext(pieces)).text == "Hel"
    coordinator.pieces = rest
    assert [piece.text async for piece in pieces] == ["lo wor", "ld"]
    again = coordinator.requests[1]
    assert again.generated_token_ids == [10]
    assert (again.speculation.rule, again.sampling.seed) == (RULE_COUPLED, 9)


async def test_the_next_coordinator_is_asked_where_one_is_not_there(
    coordinator: ScriptedCoordinator, address: str
) -> None:
    async with AsyncClient(f"127.0.0.1:1, {address}") as client:
        assert (await client.generate("hi")).text == "Hello world"
        assert (await client.describe_pair()).plans_json == ["{}"]
    assert await in_thread(f"127.0.0.1:1,{address}", lambda client: client.describe_pair().plans_json[0]) == "{}"


async def test_where_none_is_there_the_last_one_is_named() -> None:
    async with AsyncClient("127.0.0.1:1,127.0.0.1:2") as client:
        with pytest.raises(Unavailable, match=r"no coordinator answers at 127\.0\.0\.1:2"):
            await client.describe_pair()


async def test_what_a_coordinator_refuses_another_one_is_not_asked(
    coordinator: ScriptedCoordinator, address: str
) -> None:
    coordinator.pieces, coordinator.failure = [], InvalidArgument("is 3", "sampling.top_p")
    async with AsyncClient(f"{address},127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument):
            await client.generate("hi")
    assert len(coordinator.requests) == 1


async def test_closing_the_client_ends_its_streams(coordinator: ScriptedCoordinator, address: str) -> None:
    coordinator.pieces, coordinator.hangs = PIECES[:2], True

    def use(client: Client) -> None:
        chunks = client.stream("hi")
        next(chunks)
        next(chunks)
        client.close()
        with pytest.raises(Cancelled):
            next(chunks)

    await in_thread(address, use)
    assert len(coordinator.requests) == 1


def test_no_address_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="address: none is given"):
        Client(" , ")


async def test_the_deadline_ends_the_call(client: AsyncClient, coordinator: ScriptedCoordinator, address: str) -> None:
    coordinator.hangs = True
    with pytest.raises(DeadlineExceeded):
        await client.generate("hi", timeout_seconds=0.2)
    with pytest.raises(DeadlineExceeded):
        await in_thread(address, lambda sync: sync.generate("hi", timeout_seconds=0.2))


async def test_breaking_out_of_a_stream_cancels_the_request(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    coordinator.hangs = True
    async for _ in client.stream("hi"):
        break
    await asyncio.wait_for(coordinator.cancelled.wait(), 5)


async def test_an_exception_in_the_loop_cancels_the_request(
    client: AsyncClient, coordinator: ScriptedCoordinator
) -> None:
    coordinator.hangs = True

    async def fail_at_the_first_chunk() -> None:
        async for _ in client.stream("hi"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail_at_the_first_chunk()
    await asyncio.wait_for(coordinator.cancelled.wait(), 5)


async def test_closing_a_stream_cancels_the_request(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    coordinator.hangs = True
    async with aclosing(client.stream("hi")) as stream:
        await anext(stream)
    await asyncio.wait_for(coordinator.cancelled.wait(), 5)


async def test_cancelling_the_task_cancels_the_request(client: AsyncClient, coordinator: ScriptedCoordinator) -> None:
    coordinator.hangs = True
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.generate("hi"), 0.2)
    await asyncio.wait_for(coordinator.cancelled.wait(), 5)


async def test_breaking_out_of_a_synchronous_stream_cancels_the_request(
    coordinator: ScriptedCoordinator, address: str
) -> None:
    coordinator.hangs = True
    chunk = await in_thread(address, lambda sync: next(iter(sync.stream("hi"))))
    assert chunk.text == "Hel"
    await asyncio.wait_for(coordinator.cancelled.wait(), 5)


async def test_describe_pair_returns_the_description(client: AsyncClient, address: str) -> None:
    assert (await client.describe_pair()).verify_rtt_seconds == 0.001
    assert await in_thread(address, lambda sync: list(sync.describe_pair().plans_json)) == ["{}"]


def test_nobody_at_the_address_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.generate("hi", timeout_seconds=5)


def test_the_client_loads_neither_torch_nor_transformers() -> None:
    loaded = "import sys, sequoia.client; print({'torch', 'transformers', 'redis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
