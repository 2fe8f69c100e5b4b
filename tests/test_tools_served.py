"""Tools served by a running system, asked for by the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import System, start_tiny_system
from jsonschema import validate
from openai import BadRequestError, OpenAI
from tiny_models import build_tokenizer
from tool_templates import CLOCK, HERMES, NAMED, TOOLS, WEATHER, call

from coordinator.gateway.call_schema import call_schema
from sequoia.client import Message, RequestOptions
from sequoia.errors import InvalidArgument

MESSAGES: Any = [{"role": "user", "content": "How warm is it?"}]
CONVERSATION = [Message("user", "How warm is it?")]
PARAMETERS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
CHOICES: dict[str, Any] = {
    "required": "required",
    "named": {"type": "function", "function": {"name": "set-clock"}},
}
KINDS: dict[str, RequestOptions] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1, "seed": 5},
}
MODES: tuple[Any, ...] = ("off", "tree", {"size": 12, "levels": 4, "width": 3})
TOKENIZER = build_tokenizer(400).backend_tokenizer
# A random model writes blanks wherever it may.
FEW_BLANKS = {TOKENIZER.token_to_id(token): -30 for token in ("Ġ", "Ċ", "č", "ĉ")}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from start_tiny_system(tmp_path_factory.mktemp("tools"), "llama", http_port=0, chat_template=HERMES)


@pytest.fixture(scope="module")
def openai(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=system.deployment.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(openai: OpenAI, mode: Any = "tree", **options: Any) -> Any:
    extra = {"speculation": mode, **options.pop("extra_body", {})}
    given = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 300, "logit_bias": FEW_BLANKS, **options}
    return openai.chat.completions.create(model="target", extra_body=extra, **given)


def gathered(chunks: Any) -> dict[int, dict[str, Any]]:
    """The choices of a stream: content, calls as (name, arguments), and why it ended."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (each.choices[0] for each in chunks if each.choices):
        so_far = found.setdefault(choice.index, {"content": "", "calls": [], "ids": [], "reason": None, "pieces": 0})
        so_far["content"] += choice.delta.content or ""
        so_far["reason"] = choice.finish_reason or so_far["reason"]
        for each in choice.delta.tool_calls or ():
            if each.id is not None:
                assert (each.index, each.type) == (len(so_far["calls"]), "function")
                so_far["calls"].append([each.function.name, ""])
                so_far["ids"].append(each.id)
            so_far["calls"][each.index][1] += each.function.arguments
            so_far["pieces"] += 1
    return found


def calls_of(choice: Any) -> list[list[str]]:
    return [[each.function.name, each.function.arguments] for each in choice.message.tool_calls or ()]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_call_is_one_that_the_parameters_admit_and_the_same_however_it_is_drafted(
    openai: OpenAI, kind: str, choice: str
) -> None:
    options: Any = {**KINDS[kind], "tool_choice": CHOICES[choice]}
    answers = [ask(openai, mode, **options).choices[0] for mode in MODES]
    streamed = gathered(ask(openai, stream=True, **options))[0]
    assert [calls_of(each) for each in answers] == [streamed["calls"]] * len(MODES)
    assert {each.message.content for each in answers} == {None}
    assert streamed["content"] == ""
    reasons = {each.finish_reason for each in answers} | {streamed["reason"]}
    assert reasons == {"stop" if choice == "named" else "tool_calls"}
    ((name, arguments),) = streamed["calls"]
    validate(json.loads(arguments), PARAMETERS[name])
    assert choice == "required" or name == "set-clock"
    assert streamed["pieces"] > 2


def test_the_arguments_are_those_that_the_grpc_client_gets_for_the_schema(system: System, openai: OpenAI) -> None:
    options: Any = {"temperature": 0, "max_tokens": 300, "logit_bias": FEW_BLANKS}
    schema = call_schema(TOOLS)
    expected = json.loads(system.client.generate(CONVERSATION, **options, tools=TOOLS, json_schema=schema).text)
    ((name, arguments),) = calls_of(ask(openai, temperature=0, tool_choice="required").choices[0])
    assert {"name": name, "arguments": json.loads(arguments)} == expected


def test_the_answer_depends_on_the_tools_that_the_model_is_told(system: System, openai: OpenAI) -> None:
    options: Any = {"temperature": 0, "max_tokens": 24}
    told = system.client.generate(CONVERSATION, **options, tools=TOOLS)
    silent = system.client.generate(CONVERSATION, **options)
    auto = ask(openai, **options, logit_bias={})
    none = ask(openai, **options, logit_bias={}, tool_choice="none")
    assert [each.choices[0].message.content for each in (auto, none)] == [told.text, silent.text]
    assert (auto.usage.prompt_tokens, none.usage.prompt_tokens) == tuple(
        each.usage.num_prompt_tokens for each in (told, silent)
    )
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens + 100


def test_every_choice_has_a_call_of_its_own_seed_and_logprobs_of_all_tokens(openai: OpenAI) -> None:
    options: Any = {"tool_choice": "required", "logprobs": True, "top_logprobs": 1}
    alone = [calls_of(ask(openai, seed=seed, **options).choices[0]) for seed in (8, 9)]
    several = ask(openai, seed=8, n=2, **options)
    assert [calls_of(each) for each in several.choices] == alone
    told = [bytes(each.bytes) for choice in several.choices for each in choice.logprobs.content]
    assert len(told) == several.usage.completion_tokens
    chunks = list(ask(openai, seed=8, n=2, stream=True, **options))
    assert [each["calls"] for _, each in sorted(gathered(chunks).items())] == alone
    streamed = [each.choices[0].logprobs.content for each in chunks if each.choices[0].logprobs]
    assert sum(map(len, streamed)) == len(told)


def test_who_wrote_a_call_is_told_of_its_text(openai: OpenAI) -> None:
    options: Any = {"temperature": 0, "tool_choice": "required", "extra_body": {"show_speculation": True}}
    choice = ask(openai, **options).choices[0]
    ((name, arguments),) = calls_of(choice)
    written = "".join(each["text"] for each in choice.sequoia["pieces"])
    assert json.loads(written) == {"name": name, "arguments": json.loads(arguments)}


@pytest.mark.parametrize("limit", [1, 12, 30])
def test_a_limit_cuts_a_call_and_says_so(openai: OpenAI, limit: int) -> None:
    options: Any = {"temperature": 0, "tool_choice": CHOICES["named"]}
    ((_, whole),) = calls_of(ask(openai, **options).choices[0])
    cut = ask(openai, **options, max_tokens=limit).choices[0]
    ((name, arguments),) = calls_of(cut)
    assert (name, cut.finish_reason, cut.message.content) == ("set-clock", "length", None)
    assert whole.startswith(arguments)
    assert arguments != whole


def test_a_conversation_with_calls_and_results_goes_to_the_template(system: System, openai: OpenAI) -> None:
    calls = [call("get_weather", '{"place": "Köln", "unit": "C"}', "1"), call("set-clock", '{"at": {"hour": 3}}', "2")]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "set"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "warm"}]},
    ]
    conversation = [
        *CONVERSATION,
        Message("assistant", None, calls),
        Message("tool", "warm", tool_call_id="1", name="get_weather"),
        Message("tool", "set", tool_call_id="2", name="set-clock"),
    ]
    options: Any = {"temperature": 0, "max_tokens": 16, "tools": [CLOCK]}
    expected = system.client.generate(conversation, **options)
    answer = ask(openai, **options, messages=messages, logit_bias={})
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.usage.num_prompt_tokens


def test_a_call_comes_back_as_it_was_received(openai: OpenAI) -> None:
    options: Any = {"seed": 3, "tools": [CLOCK]}
    message = ask(openai, **options, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    answer = ask(openai, **options, max_tokens=8, messages=[*MESSAGES, message.model_dump(), result])
    assert answer.usage.completion_tokens > 0


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "tools[0].function.name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 2**18}}]}, "tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "look"}}}, "tool_choice.function.name"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"extra_body": {"min_tokens": 3}}, "min_tokens"),
    ({"extra_body": {"functions": [CLOCK["function"]]}}, "functions"),
    ({"extra_body": {"function_call": "auto"}}, "function_call"),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[1].tool_call_id"),
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=lambda value: str(value)[:60])
def test_what_cannot_be_served_is_refused_by_its_name(
    openai: OpenAI, fields: dict[str, Any], param: str, streams: bool
) -> None:
    with pytest.raises(BadRequestError) as refused:
        ask(openai, **{"tool_choice": "required", "stream": streams, **fields})
    assert refused.value.param == param


def test_the_grpc_client_hears_what_is_wrong_with_its_tools(system: System) -> None:
    with pytest.raises(InvalidArgument) as refused:
        system.client.generate(CONVERSATION, tools=[{"type": "function", "function": {"name": ""}}])
    assert refused.value.field == "chat.tools[0].function.name"


def test_a_template_that_teaches_no_calls_has_forced_ones_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    for system in start_tiny_system(tmp_path_factory.mktemp("named"), "llama", http_port=0, chat_template=NAMED):
        with OpenAI(base_url=system.deployment.url, api_key="none", max_retries=0, timeout=60) as client:
            with pytest.raises(BadRequestError, match="require a call, or name a function") as refused:
                ask(client)
            assert refused.value.param == "tool_choice"
            ((name, arguments),) = calls_of(ask(client, tool_choice="required", seed=1).choices[0])
            validate(json.loads(arguments), PARAMETERS[name])
            assert ask(client, tool_choice="none", max_tokens=2).choices[0].message.tool_calls is None
