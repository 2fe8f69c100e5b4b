"""Calls that a model writes of its own accord: the gateway and the official client, before a scripted coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from tool_templates import TOOLS

from coordinator.gateway.app import build_app
from coordinator.gateway.config import GatewayConfig
from coordinator.gateway.keys import ApiKeys
from sequoia.border import Context
from sequoia.client import AsyncClient
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc, sampling_pb2, worker_pb2

MESSAGES: Any = [{"role": "user", "content": "How warm is it, and how late?"}]
ARGUMENTS = '{"place": "Köln </tool_call>", "unit": "C"}'
ANSWER = (
    f'Let me <see>.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "set-clock", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "look", "arguments": {}}'
    "\n</tool_call>"
)
CALLS = [["get_weather", ARGUMENTS], ["set-clock", "{}"]]
REST = '\n\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


class WritingCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Every answer is `answer`, so many letters a step."""

    def __init__(self) -> None:
        self.answer, self.size = ANSWER, 7
        self.reason = pb.FINISH_REASON_STOP
        self.requests: list[pb.GenerateRequest] = []

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        for number, start in enumerate(range(0, len(self.answer), self.size)):
            token = sampling_pb2.TokenLogprobs(token_id=5, raw=-1, token_bytes=b"x")
            told = [token] if request.sampling.HasField("num_logprobs") else []
            text = self.answer[start : start + self.size]
            yield pb.GenerateResponse(text=text, token_ids=[5], logprobs=told, num_tokens_before=number)
        yield pb.GenerateResponse(finish=pb.Finish(reason=self.reason), num_tokens_before=number + 1)

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return pb.DescribePairResponse(verify=worker_pb2.WorkerDescription(model="target"))


@pytest.fixture
async def coordinator() -> WritingCoordinator:
    return WritingCoordinator()


@pytest.fixture
async def openai(address: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncClient(address) as client:
        app = build_app(GatewayConfig(), client, ApiKeys(""))
        web = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
        async with AsyncOpenAI(base_url="http://gateway/v1", api_key="none", max_retries=0, http_client=web) as asking:
            yield asking


async def ask(openai: AsyncOpenAI, **options: Any) -> Any:
    return await openai.chat.completions.create(**{"model": "target", "messages": MESSAGES, "tools": TOOLS, **options})


async def chunks_of(openai: AsyncOpenAI, **options: Any) -> list[Any]:
    return [each.choices[0] async for each in await ask(openai, stream=True, **options)]


def calls_of(calls: Sequence[Any] | None) -> list[list[str]]:
    return [[each.function.name, each.function.arguments] for each in calls or ()]


async def test_calls_in_the_text_are_calls_and_the_rest_is_content(
    openai: AsyncOpenAI, coordinator: WritingCoordinator
) -> None:
    choice = (await ask(openai)).choices[0]
    assert calls_of(choice.message.tool_calls) == CALLS
    assert choice.message.content == "Let me <see>." + REST
    assert choice.finish_reason == "tool_calls"
    assert coordinator.requests[0].chat.tool_call_form == pb.TOOL_CALL_FORM_HERMES
    assert not coordinator.requests[0].sampling.HasField("json_schema")


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
async def test_a_stream_says_the_same_whatever_its_steps(
    openai: AsyncOpenAI, coordinator: WritingCoordinator, size: int
) -> None:
    coordinator.size = size
    choices = await chunks_of(openai)
    assert "".join(each.delta.content or "" for each in choices) == "Let me <see>." + REST
    deltas = [each for choice in choices for each in choice.delta.tool_calls or ()]
    assert [(each.index, each.type, each.function.name) for each in deltas if each.id] == [
        (0, "function", "get_weather"),
        (1, "function", "set-clock"),
    ]
    for index, (_, arguments) in enumerate(CALLS):
        assert "".join(each.function.arguments for each in deltas if each.index == index) == arguments
    assert [each.finish_reason for each in choices if each.finish_reason] == ["tool_calls"]


async def test_the_official_accumulator_gathers_a_stream(openai: AsyncOpenAI) -> None:
    async with openai.chat.completions.stream(model="target", messages=MESSAGES, tools=TOOLS) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    assert calls_of(message.tool_calls) == CALLS
    assert message.content == "Let me <see>." + REST


async def test_one_call_where_one_is_allowed(openai: AsyncOpenAI) -> None:
    choice = (await ask(openai, parallel_tool_calls=False)).choices[0]
    assert (calls_of(choice.message.tool_calls), choice.message.content) == (CALLS[:1], "Let me <see>.")
    assert choice.finish_reason == "tool_calls"
    streamed = await chunks_of(openai, parallel_tool_calls=False)
    assert sum(bool(each.id) for choice in streamed for each in choice.delta.tool_calls or ()) == 1


async def test_an_answer_without_calls_is_text(openai: AsyncOpenAI, coordinator: WritingCoordinator) -> None:
    coordinator.answer = "It is warm; <tool_call> is how\n"
    choice = (await ask(openai)).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (coordinator.answer, None)
    assert choice.finish_reason == "stop"
    streamed = await chunks_of(openai)
    assert "".join(each.delta.content or "" for each in streamed) == coordinator.answer


async def test_a_limit_behind_calls_is_told(openai: AsyncOpenAI, coordinator: WritingCoordinator) -> None:
    coordinator.reason = pb.FINISH_REASON_LENGTH
    choice = (await ask(openai)).choices[0]
    assert (len(choice.message.tool_calls or ()), choice.finish_reason) == (2, "length")


async def test_logprobs_are_those_of_all_tokens_and_every_choice_has_its_calls(
    openai: AsyncOpenAI, coordinator: WritingCoordinator
) -> None:
    answer = await ask(openai, logprobs=True, n=2)
    num_tokens = -(-len(ANSWER) // coordinator.size)
    for choice in answer.choices:
        assert calls_of(choice.message.tool_calls) == CALLS
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or ()) == num_tokens
    streamed = await chunks_of(openai, logprobs=True)
    assert sum(len(each.logprobs.content) for each in streamed if each.logprobs) == num_tokens
    ids = [each.id for choice in answer.choices for each in choice.message.tool_calls or ()]
    assert len(set(ids)) == 4


async def test_without_tools_to_choose_the_marks_are_text(openai: AsyncOpenAI, coordinator: WritingCoordinator) -> None:
    choice = (await ask(openai, tool_choice="none")).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (ANSWER, None)
    assert not coordinator.requests[0].chat.tools_json
