"""The OpenAI API, by the official client: against the running system, and what that one's own client says of it."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import headless_chromium, needs_chromium
from conftest import System, start_tiny_system
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from sequoia.client import Message, RequestOptions

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sky is"}]
CONVERSATION = [Message("system", "Be brief."), Message("user", "The sky is")]
PROMPT = "A tree has one root"
SEEDED: RequestOptions = {"temperature": 0.9, "seed": 11, "max_tokens": 24}
KINDS: dict[str, RequestOptions] = {
    "greedy": {"temperature": 0, "max_tokens": 24},
    "seeded": SEEDED,
    "penalised": {**SEEDED, "presence_penalty": 0.5, "frequency_penalty": 0.7, "top_p": 0.9, "logit_bias": {40: 3}},
}

ASK = """
const set = (id, value) => { document.getElementById(id).value = value; };
set("speculation", "tree"); set("temperature", "0"); set("max-tokens", "32"); set("text", "The sky <b>is</b>");
document.getElementById("ask").requestSubmit();
"""


@dataclass(frozen=True)
class Served:
    """A running system, its OpenAI API, and the official client of that."""

    system: System
    openai: OpenAI
    model: str

    @property
    def url(self) -> str:
        url = self.system.deployment.url
        assert url is not None
        return url

    def wait_until_busy(self) -> None:
        """Until the target has a session."""
        deadline = time.monotonic() + 5
        while not self.system.num_slots_used("verify"):
            assert time.monotonic() < deadline

    def wait_until_free(self) -> None:
        """Until neither worker has a session: raises AssertionError where one keeps its slot."""
        deadline = time.monotonic() + 5
        while any(used := [self.system.num_slots_used(name) for name in ("verify", "draft")]):
            assert time.monotonic() < deadline, used


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    for system in start_tiny_system(tmp_path_factory.mktemp("gateway"), "llama", http_port=0):
        client = OpenAI(base_url=system.deployment.url, api_key="none", max_retries=0, timeout=60)
        with client:
            yield Served(system, client, client.models.list().data[0].id)


@pytest.fixture
async def asynchronous(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat_text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_model_is_listed_and_found_by_its_name(served: Served) -> None:
    assert served.model == "target"
    assert served.openai.models.retrieve("target").id == "target"
    with pytest.raises(NotFoundError):
        served.openai.models.retrieve("gpt-4o")


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_text_of_the_grpc_client(served: Served, kind: str) -> None:
    expected = served.system.client.generate(CONVERSATION, **KINDS[kind])
    answer = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, **KINDS[kind])
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.num_prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.num_completion_tokens


def test_a_prompt_that_was_read_before_is_told_in_the_usage(served: Served) -> None:
    messages = [{"role": "user", "content": "A question that nobody has asked so far, and then it is asked again"}]
    first, again = (
        served.openai.chat.completions.create(model=served.model, messages=messages, max_tokens=2, temperature=0).usage
        for _ in range(2)
    )
    assert first is not None
    assert again is not None
    assert first.prompt_tokens_details is not None
    assert again.prompt_tokens_details is not None
    cached = again.prompt_tokens_details.cached_tokens or 0
    assert (first.prompt_tokens_details.cached_tokens or 0) < cached < again.prompt_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_has_the_text_of_the_grpc_client(served: Served, kind: str) -> None:
    expected = served.system.client.generate(PROMPT, **KINDS[kind])
    answer = served.openai.completions.create(model=served.model, prompt=PROMPT, **KINDS[kind])
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_stream_are_the_text_and_its_end_has_the_usage(served: Served, kind: str) -> None:
    expected = served.system.client.generate(CONVERSATION, **KINDS[kind])
    options: Any = {**KINDS[kind], "stream_options": {"include_usage": True}}
    chunks = list(served.openai.chat.completions.create(model=served.model, messages=MESSAGES, stream=True, **options))
    assert chat_text(chunks) == expected.text
    assert len(chunks) > 4
    assert chunks[-1].usage.completion_tokens == expected.usage.num_completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_completion_streams_its_prompt_first_where_it_is_echoed(served: Served) -> None:
    expected = served.system.client.generate(PROMPT, **SEEDED)
    options: Any = {**SEEDED, "echo": True}
    chunks = served.openai.completions.create(model=served.model, prompt=PROMPT, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + expected.text


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(served: Served) -> None:
    options: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, **options)
    assert answer.usage is not None
    assert answer.usage.total_tokens == served.openai.models.list().data[0].sequoia["context_length"]  # type: ignore[attr-defined]


def test_a_completion_without_a_limit_has_sixteen_tokens(served: Served) -> None:
    answer = served.openai.completions.create(model=served.model, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_halves_of_characters_are_never_sent(served: Served) -> None:
    vocabulary = json.loads((served.system.target / "tokenizer.json").read_text())["model"]["vocab"]
    # The letters for the bytes C3 and A9, which together are an é.
    biases = {vocabulary["Ã"]: 100, vocabulary["©"]: 100}
    options: RequestOptions = {"temperature": 1, "seed": 5, "max_tokens": 200, "logit_bias": biases}
    expected = served.system.client.generate(PROMPT, **options)
    chunks = served.openai.completions.create(model=served.model, prompt=PROMPT, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert expected.text.count("é") > 20


def test_choices_have_the_seeds_that_follow(served: Served) -> None:
    alone = [served.system.client.generate(PROMPT, **{**SEEDED, "seed": 11 + index}).text for index in range(3)]
    answer = served.openai.completions.create(model=served.model, prompt=PROMPT, n=3, **SEEDED)
    assert [choice.text for choice in answer.choices] == alone
    assert len(set(alone)) == 3
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == served.system.client.generate(PROMPT, **SEEDED).usage.num_prompt_tokens


def test_choices_of_a_stream_are_told_apart_by_their_index(served: Served) -> None:
    alone = [served.system.client.generate(CONVERSATION, **{**SEEDED, "seed": 11 + index}).text for index in range(2)]
    chunks = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, n=2, stream=True, **SEEDED)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == alone


def test_every_prompt_of_a_list_has_its_choices(served: Served) -> None:
    prompts = [PROMPT, "Seven quick"]
    alone = [served.system.client.generate(prompt, **SEEDED).text for prompt in prompts]
    answer = served.openai.completions.create(model=served.model, prompt=prompts, best_of=2, n=2, **SEEDED)
    assert [answer.choices[0].text, answer.choices[2].text] == alone
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_a_prompt_may_be_token_ids(served: Served) -> None:
    expected = served.system.client.generate([5, 6, 7], **SEEDED)
    answer = served.openai.completions.create(model=served.model, prompt=[5, 6, 7], **SEEDED)
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("as_list", [True, False])
def test_an_answer_ends_before_a_stop_string(served: Served, as_list: bool) -> None:
    text = served.system.client.generate(PROMPT, **SEEDED).text
    stop = text[6:9]
    answer = served.openai.completions.create(
        model=served.model, prompt=PROMPT, stop=[stop, "never seen"] if as_list else stop, **SEEDED
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_chat_logprobs_are_the_models_own(served: Served) -> None:
    expected = served.system.client.generate(CONVERSATION, **SEEDED, logprobs=2)
    answer = served.openai.chat.completions.create(
        model=served.model, messages=MESSAGES, logprobs=True, top_logprobs=2, **SEEDED
    )
    content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert content is not None
    # A row's logits move a little with the forward it is in, and trees differ from time to time.
    assert [each.logprob for each in content] == pytest.approx([each.raw for each in expected.logprobs], abs=1e-4)
    assert [bytes(each.bytes or ()) for each in content] == [each.token_bytes for each in expected.logprobs]
    told = [top.logprob for each in content for top in each.top_logprobs]
    assert told == pytest.approx([raw for each in expected.logprobs for _, raw, _ in each.top], abs=1e-4)
    text = b"".join(bytes(each.bytes or ()) for each in content).decode(errors="replace")
    assert text.removesuffix("</s>") == answer.choices[0].message.content


def test_logprobs_of_a_stream_are_those_of_the_whole(served: Served) -> None:
    options: Any = {**SEEDED, "logprobs": True, "top_logprobs": 1}
    whole = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, **options)
    chunks = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, stream=True, **options)
    pieces = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    content = whole.choices[0].logprobs.content
    assert [each.token for piece in pieces for each in piece] == [each.token for each in content]
    streamed = [each.logprob for piece in pieces for each in piece]
    assert streamed == pytest.approx([each.logprob for each in content], abs=1e-4)


def test_offsets_of_a_completions_logprobs_point_into_its_text(served: Served) -> None:
    # The tokens of a prompt that is repeated: whole characters every one.
    options: Any = {"temperature": 0, "max_tokens": 12, "logprobs": 3, "stream": False}
    options["logit_bias"] = dict.fromkeys(map(str, range(70, 90)), 60)
    choice = served.openai.completions.create(model=served.model, prompt=PROMPT, **options).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    for token, offset, likeliest in zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True):
        assert choice.text[offset:].startswith(token)
        assert token in likeliest
        assert len(likeliest) <= 4


def test_figures_of_speculation_come_with_the_answer(served: Served) -> None:
    options: Any = {**SEEDED, "extra_body": {"speculation": "tree", "show_speculation": True}}
    answer = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, **options)
    ours: Any = answer.choices[0].sequoia  # type: ignore[attr-defined]
    assert ours["rule"] == "coupled"
    assert ours["seed"] == 11
    assert ours["speculation"]["num_drafted_steps"] > 0
    assert "".join(piece["text"] for piece in ours["pieces"]) == answer.choices[0].message.content


def test_who_wrote_what_is_told_step_by_step(served: Served) -> None:
    options: Any = {**SEEDED, "extra_body": {"speculation": "tree", "show_speculation": True}}
    chunks = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, stream=True, **options)
    ours: list[Any] = [chunk.choices[0].sequoia for chunk in chunks if hasattr(chunk.choices[0], "sequoia")]
    steps, figures = ours[:-1], ours[-1]["speculation"]
    assert len(steps) == figures["steps"] + 1
    assert sum(step["num_tokens"] for step in steps) == SEEDED["max_tokens"]
    assert {piece["from"] for step in steps for piece in step["pieces"]} == {"draft", "target"}


def test_a_message_may_be_in_parts_and_may_be_one_that_was_received(served: Served) -> None:
    received: Any = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, **SEEDED)
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        MESSAGES[1],
        received.choices[0].message.model_dump(),
        {"role": "user", "content": "Go on."},
    ]
    answer = served.openai.chat.completions.create(model=served.model, messages=messages, **SEEDED)
    said = received.choices[0].message.content
    conversation = [*CONVERSATION, Message("assistant", said), Message("user", "Go on.")]
    assert answer.choices[0].message.content == served.system.client.generate(conversation, **SEEDED).text


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "look"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"extra_body": {"guided_regex": "a+"}}, "guided_regex"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 3}, "max_tokens"),
    ({"n": 33}, "n"),
    ({"n": 0}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64 - 1, "n": 2}, "seed"),
    ({"seed": True}, "seed"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"sky": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"extra_body": {"rule": "sequoia"}, "seed": 1}, "seed"),
    ({"extra_body": {"rule": "best"}}, "rule"),
    ({"extra_body": {"speculation": "maybe"}}, "speculation"),
    ({"extra_body": {"speculation": {"parents": [0]}}}, "speculation"),
    ({"extra_body": {"speculation": {"parents": [-1] + [0] * 5000}}}, "speculation"),
    ({"extra_body": {"speculation": {"parents": [-1, 0.0]}}}, "speculation.parents[1]"),
    ({"extra_body": {"speculation": {"size": 4, "levels": 9, "width": 1}}}, "speculation"),
    ({"extra_body": {"speculation": {"size": 4.5, "levels": 2, "width": 1}}}, "speculation.size"),
    ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
    ({"extra_body": {"min_tokens": 99}}, "min_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "content": "5"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "5", "name": "Ann"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_served_is_refused_by_its_name(served: Served, fields: dict[str, Any], param: str) -> None:
    body = {"model": served.model, "messages": MESSAGES, "max_completion_tokens": 4, **fields}
    body |= {"max_completion_tokens": None} if "max_tokens" in fields and len(fields) == 1 else {}
    with pytest.raises(BadRequestError) as refused:
        served.openai.chat.completions.create(**body)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert str(refused.value.body["message"]).startswith(f"{param}: ")  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [5, 6]}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": "word " * 2000}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_completion_cannot_have_is_refused_by_its_name(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError) as refused:
        served.openai.completions.create(**{"model": served.model, "prompt": PROMPT, "max_tokens": 4, **fields})
    assert refused.value.param == param


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    nothing: Any = {"response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"], "user": "ann"}
    answer = served.openai.chat.completions.create(model=served.model, messages=MESSAGES, **nothing, **SEEDED)
    assert answer.choices[0].message.content == served.system.client.generate(CONVERSATION, **SEEDED).text


def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(NotFoundError) as missed:
        served.openai.completions.create(model="gpt-4o", prompt=PROMPT)
    assert (missed.value.code, missed.value.param) == ("model_not_found", "model")


def test_a_route_that_is_not_served_is_told_in_the_same_shape(served: Served) -> None:
    with pytest.raises(NotFoundError) as missed:
        served.openai.embeddings.create(model=served.model, input="x")
    assert "POST /v1/embeddings is not served" in missed.value.message


def test_a_client_that_leaves_a_stream_frees_both_slots(served: Served) -> None:
    options: Any = {"max_tokens": 900, "temperature": 0, "extra_body": {"ignore_eos": True, "speculation": "tree"}}
    stream = served.openai.completions.create(model=served.model, prompt=PROMPT, stream=True, **options)
    next(iter(stream))
    assert served.system.num_slots_used("verify") == 1
    stream.close()
    served.wait_until_free()
    assert "left by its client" in served.system.deployment.processes["gateway"].log_path.read_text()


async def test_a_client_that_does_not_wait_for_its_answer_frees_both_slots(
    served: Served, asynchronous: AsyncOpenAI
) -> None:
    options: Any = {"max_tokens": 900, "temperature": 0, "n": 2, "extra_body": {"ignore_eos": True}}
    asking = asyncio.ensure_future(asynchronous.completions.create(model=served.model, prompt=PROMPT, **options))
    await asyncio.to_thread(served.wait_until_busy)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    served.wait_until_free()


async def test_requests_at_a_time_have_the_texts_of_one_after_the_other(
    served: Served, asynchronous: AsyncOpenAI
) -> None:
    prompts = [f"{PROMPT} {index}" for index in range(8)]
    alone = [served.system.client.generate(prompt, **SEEDED).text for prompt in prompts]
    asked = [asynchronous.completions.create(model=served.model, prompt=each, **SEEDED) for each in prompts]
    assert [answer.choices[0].text for answer in await asyncio.gather(*asked)] == alone


def post(served: Served, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=10)
    connection.request("POST", "/v1/completions", body, {"Content-Type": kind})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model": "target", "prompt": "\\ud800"}', "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * (3 * 2**20 + 1), "application/json", 413),
    ],
)
def test_a_body_that_is_none_is_refused(served: Served, body: bytes, kind: str, status: int) -> None:
    got, told = post(served, body, kind)
    assert got == status
    assert told["error"]["type"] == "invalid_request_error"


def test_the_system_is_healthy(served: Served) -> None:
    connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


@needs_chromium
def test_the_page_answers_in_two_colours_and_without_complaint(served: Served, tmp_path: Path) -> None:
    expected = served.system.client.generate([Message("user", "The sky <b>is</b>")], max_tokens=32, temperature=0)
    with headless_chromium(tmp_path) as browser:
        browser.open(served.url.removesuffix("v1"))
        browser.wait_for("document.getElementById('model').textContent.includes('target, drafted by draft')")
        browser.run(ASK)
        browser.wait_for("document.getElementById('shares').children.length")
        assert browser.run("return document.querySelector('.said.assistant').textContent") == expected.text
        assert browser.run("return document.querySelector('.said.user').textContent") == "The sky <b>is</b>"
        assert browser.run("return document.querySelectorAll('.said.assistant .draft').length") > 0
        assert browser.run("return document.querySelectorAll('.said.assistant .target').length") > 0
        assert browser.run("return document.querySelectorAll('#steps rect').length") > 0
        assert [each for each in browser.errors() if each["level"] in ("SEVERE", "WARNING")] == []
