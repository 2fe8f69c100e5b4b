"""`sequoia chat` against a scripted coordinator, and its view without one."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import AsyncIterator
from itertools import count

import pytest
from rich.console import Console
from test_origins import chunk

from sequoia.border import Context, error_border
from sequoia.cli import main
from sequoia.cli.chat_view import AnswerView
from sequoia.errors import ResourceExhausted
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc, worker_pb2


class TalkativeCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers with how many messages it was sent, and remembers them."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return pb.DescribePairResponse(verify=worker_pb2.WorkerDescription(model="big"))

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        async with error_border(context):
            if request.chat.messages[-1].content == "fail":
                raise ResourceExhausted("all slots are in use", "queue")
            yield pb.GenerateResponse(num_prompt_tokens=3, text="answer to ", token_ids=[5])
            finish = pb.Finish(reason=pb.FINISH_REASON_STOP, num_completion_tokens=2, total_seconds=0.5)
            last = str(len(request.chat.messages))
            yield pb.GenerateResponse(text=last, token_ids=[6], num_tokens_before=1, finish=finish)


@pytest.fixture
def coordinator() -> TalkativeCoordinator:
    return TalkativeCoordinator()


async def talk(monkeypatch: pytest.MonkeyPatch, address: str, said: str, *flags: str) -> int:
    """The command with that on its stdin, kept off the loop that serves it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    return await asyncio.to_thread(main, ["chat", "--address", address, *flags])


async def test_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    coordinator: TalkativeCoordinator,
) -> None:
    assert await talk(monkeypatch, address, "Hello\n\nAnd then?\n", "--system", "Be brief.") == 0
    assert capsys.readouterr().out == "answer to 2\nanswer to 4\n"
    sent = [(each.role, each.content) for each in coordinator.requests[-1].chat.messages]
    assert sent == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "answer to 2"),
        ("user", "And then?"),
    ]


async def test_another_conversation_begins_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    assert await talk(monkeypatch, address, "Hello\n/new\nHello again\n") == 0
    assert capsys.readouterr().out == "answer to 1\nanswer to 1\n"


async def test_flags_reach_the_request_and_bytes_are_asked_for_only_to_colour(
    monkeypatch: pytest.MonkeyPatch, address: str, coordinator: TalkativeCoordinator
) -> None:
    flags = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--max-tokens", "7", "--speculation", "off"]
    await talk(monkeypatch, address, "Hello\n", *flags)
    request = coordinator.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (0.5, 0.9, 3)
    assert (request.max_tokens, request.speculation.mode) == (7, pb.SPECULATION_MODE_OFF)
    assert not request.sampling.HasField("num_logprobs")
    await talk(monkeypatch, address, "Hello\n", "--show-speculation")
    assert coordinator.requests[-1].sampling.num_logprobs == 0
    assert coordinator.requests[-1].sampling.HasField("num_logprobs")


async def test_a_failure_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    assert await talk(monkeypatch, address, "fail\n") == 1
    assert capsys.readouterr().err == "error: queue: all slots are in use\n"


def terminal(out: io.StringIO) -> Console:
    return Console(file=out, force_terminal=True, width=20, color_system="standard", legacy_windows=False)


def test_the_view_colours_draft_and_target() -> None:
    out, clock = io.StringIO(), map(float, count())
    with AnswerView(terminal(out), shows_speculation=True, clock=lambda: next(clock)) as view:
        view.show(chunk("The", b"The"))
        view.show(chunk(" sky is", b" sky", b" is"))
        told = view.figures().plain
    assert "\x1b[1;33mThe\x1b[0m\x1b[32m sky\x1b[0m\x1b[1;33m is\x1b[0m" in out.getvalue()
    assert told == "3 tokens · 2.0 tokens/s · 2.00 tokens/step"


def test_full_lines_are_printed_once() -> None:
    out = io.StringIO()
    with AnswerView(terminal(out), shows_speculation=False) as view:
        view.show(chunk("one two three four five six\nseven", b"x"))
        view.show(chunk(" eight\n\nnine", b"y"))
    printed = out.getvalue()
    assert [printed.count(line) for line in ("one two three four", "five six", "seven eight")] == [1, 1, 1]
    assert printed.index("five six") < printed.index("seven eight") < printed.index("nine")


def test_an_answer_without_a_token_has_figures_too() -> None:
    assert AnswerView(Console(quiet=True), shows_speculation=False).figures().plain.startswith("0 tokens · - tokens/s")
