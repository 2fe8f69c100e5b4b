"""Many prompts in one call: order, how many at a time, what fails alone, what ends with the call. Both clients."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from typing import Any, TypeAlias

import pytest

from sequoia import AsyncClient, Client
from sequoia.border import error_border
from sequoia.client import Generation, Message
from sequoia.errors import Cancelled, InvalidArgument, ResourceExhausted, SequoiaError
from sequoia.request_scope import REQUEST_ID, request_scope
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc

FINISH = pb.Finish(reason=pb.FINISH_REASON_STOP, num_completion_tokens=1)
HANGS = """
import signal, sys
from sequoia import Client
signal.signal(signal.SIGINT, signal.default_int_handler)
Client(sys.argv[1]).batch(["hang"] * 9, max_concurrency=3)
"""
Answers: TypeAlias = list[Generation | SequoiaError]
Batch: TypeAlias = Callable[..., Awaitable[Answers]]


class BusyCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers a number with itself, after so many milliseconds; "fail" and "hang" do. Counts what runs at a time."""

    def __init__(self) -> None:
        self.num_running = self.most_running = self.num_hanging = self.num_cancelled = 0
        self.requests: list[pb.GenerateRequest] = []
        self.request_ids: set[str] = set()
        self.three_hang, self.none_runs = asyncio.Event(), asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.request_ids |= {value for key, value in context.invocation_metadata() if key == REQUEST_ID}
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async with error_border(context):
                if request.text == "fail":
                    raise ResourceExhausted("3 requests run and 0 wait", "queue")
                if request.text == "hang":
                    yield pb.GenerateResponse(text="h", token_ids=[1])
                    self.num_hanging += 1
                    if self.num_hanging == 3:
                        self.three_hang.set()
                    await asyncio.Event().wait()
                await asyncio.sleep(int(request.text or 0) / 1000)
                yield pb.GenerateResponse(text=request.text, token_ids=[7], finish=FINISH)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
            if not self.num_running:
                self.none_runs.set()


@pytest.fixture
async def coordinator() -> BusyCoordinator:
    return BusyCoordinator()


@pytest.fixture(params=["Client", "AsyncClient"])
async def batch(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Batch]:
    """`batch` of either client, for this loop."""
    if request.param == "AsyncClient":
        async with AsyncClient(address) as client:
            yield client.batch
    else:
        with Client(address) as sync:
            yield lambda *prompts, **options: asyncio.to_thread(sync.batch, *prompts, **options)


def texts(answers: Answers) -> list[str]:
    return [answer.text if isinstance(answer, Generation) else type(answer).__name__ for answer in answers]


async def test_answers_have_the_order_of_the_prompts(batch: Batch) -> None:
    assert texts(await batch(["60", "1", "30", "2"])) == ["60", "1", "30", "2"]


async def test_so_many_are_asked_for_at_a_time_and_no_more(batch: Batch, coordinator: BusyCoordinator) -> None:
    await batch((str(20) for _ in range(9)), max_concurrency=3)
    assert (len(coordinator.requests), coordinator.most_running) == (9, 3)


async def test_one_that_fails_costs_the_others_nothing(batch: Batch) -> None:
    answers = await batch(["1", "fail", "2"], max_concurrency=1)
    assert texts(answers) == ["1", "ResourceExhausted", "2"]
    assert str(answers[1]) == "queue: 3 requests run and 0 wait"


async def test_the_deadline_is_each_requests_own(batch: Batch) -> None:
    answers = await batch(["hang", "1", "hang", "2"], max_concurrency=1, timeout_seconds=0.7)
    assert texts(answers) == ["DeadlineExceeded", "1", "DeadlineExceeded", "2"]


async def test_no_prompts_have_no_answers(batch: Batch, coordinator: BusyCoordinator) -> None:
    assert await batch([]) == []
    assert coordinator.requests == []


async def test_options_are_every_requests_and_seeds_each_ones_own(batch: Batch, coordinator: BusyCoordinator) -> None:
    await batch(["1", "1"], seed=5, temperature=0.5, max_concurrency=1)
    await batch(["1", "1", "1"], seeds=range(3), max_concurrency=1)
    await batch(["1"], seeds=None, max_concurrency=1)
    assert [each.sampling.seed for each in coordinator.requests[:5]] == [5, 5, 0, 1, 2]
    assert {each.sampling.temperature for each in coordinator.requests[:2]} == {0.5}
    assert [each.sampling.HasField("seed") for each in coordinator.requests[2:]] == [True, True, True, False]


async def test_requests_belong_to_the_request_that_they_are_made_for(
    batch: Batch, coordinator: BusyCoordinator
) -> None:
    with request_scope([(REQUEST_ID, "mine")]):
        await batch(["1", "2", "3"])
    assert coordinator.request_ids == {"mine"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": "one"}, "prompts"),
        ({"prompts": 7}, "prompts"),
        ({"prompts": ["1", []]}, "prompts[1]"),
        ({"prompts": [Message("user", "1")]}, "prompts[0]"),
        ({"prompts": [1, 2]}, "prompts[0]"),
        ({"seeds": [1]}, "seeds"),
        ({"seeds": count()}, "seeds"),
        ({"seeds": 7}, "seeds"),
        ({"seeds": [1, -1]}, "seeds[1]"),
        ({"seeds": [1, 2], "seed": 3}, "seeds"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 1.5}, "max_concurrency"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"temprature": 1}, "temprature"),
        ({"top_p": "x"}, "top_p"),
    ],
    ids=str,
)
async def test_a_wrong_argument_is_named_before_anything_is_sent(
    batch: Batch, coordinator: BusyCoordinator, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await batch(**{"prompts": ["1", "2"], **arguments})
    assert raised.value.field == field
    assert coordinator.requests == []


async def test_cancelling_the_task_cancels_its_requests_and_sends_no_more(
    coordinator: BusyCoordinator, address: str
) -> None:
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.batch(["hang"] * 9, max_concurrency=3))
        await asyncio.wait_for(coordinator.three_hang.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(coordinator.none_runs.wait(), 5)
    assert (len(coordinator.requests), coordinator.num_cancelled) == (3, 3)


async def test_an_interrupt_cancels_the_requests_and_sends_no_more(coordinator: BusyCoordinator, address: str) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HANGS, address, stderr=subprocess.PIPE)
    await asyncio.wait_for(coordinator.three_hang.wait(), 20)
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 10)
    assert errors.strip().endswith(b"KeyboardInterrupt")
    await asyncio.wait_for(coordinator.none_runs.wait(), 5)
    assert (len(coordinator.requests), coordinator.num_cancelled) == (3, 3)


async def test_closing_the_client_cancels_its_batch(coordinator: BusyCoordinator, address: str) -> None:
    with Client(address) as client:
        asked = asyncio.create_task(asyncio.to_thread(client.batch, ["1", *["hang"] * 5], max_concurrency=3))
        await asyncio.wait_for(coordinator.three_hang.wait(), 5)
        client.close()
        assert texts(await asked) == ["1", *["Cancelled"] * 5]
        with pytest.raises(Cancelled, match="the client is closed"):
            client.generate("1")
    assert len(coordinator.requests) == 4
