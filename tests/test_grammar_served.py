"""Answers held to a JSON schema by a running system: over HTTP by the official client, and over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import System, start_tiny_system
from jsonschema import validate
from openai import BadRequestError, OpenAI
from pydantic import BaseModel
from tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sequoia.client import Client, Message, RequestOptions
from sequoia.engine.grammar import Grammars
from sequoia.engine.tokenizer import TokenizerDescription
from sequoia.errors import InvalidArgument
from sequoia.options import build_request
from sequoia.rpc import open_sync_channel
from sequoia.v1 import coordinator_pb2_grpc

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["the sky", "the sea"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "Who is the root of a tree?"}]
CONVERSATION = [Message("user", "Who is the root of a tree?")]
KINDS: dict[str, RequestOptions] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1, "seed": 5},
    "penalised": {"temperature": 0.9, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5},
}
TOKENIZER = build_tokenizer(400).backend_tokenizer
# A random model writes blanks wherever it may.
FEW_BLANKS = {TOKENIZER.token_to_id(token): -30 for token in ("Ġ", "Ċ", "č", "ĉ")}
MODES: tuple[Any, ...] = ("off", "tree", {"size": 12, "levels": 4, "width": 3})


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from start_tiny_system(tmp_path_factory.mktemp("grammar"), "llama", http_port=0)


@pytest.fixture(scope="module")
def openai(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=system.deployment.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(openai: OpenAI, mode: Any = "tree", **options: Any) -> Any:
    given = {"messages": MESSAGES, "max_tokens": 600, "response_format": FORM, "logit_bias": FEW_BLANKS, **options}
    return openai.chat.completions.create(model="target", extra_body={"speculation": mode}, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_json_that_the_schema_admits_and_the_same_however_it_is_drafted(
    openai: OpenAI, kind: str
) -> None:
    whole = [ask(openai, mode, **KINDS[kind]) for mode in MODES]
    chunks = [each for each in ask(openai, stream=True, **KINDS[kind]) if each.choices]
    streamed = "".join(each.choices[0].delta.content or "" for each in chunks)
    assert {each.choices[0].message.content for each in whole} == {streamed}
    assert {each.choices[0].finish_reason for each in whole} == {chunks[-1].choices[0].finish_reason} == {"stop"}
    validate(json.loads(streamed), SCHEMA)


def test_the_greedy_answer_is_that_of_transformers_masked_token_by_token(system: System) -> None:
    tokenizer = AutoTokenizer.from_pretrained(system.target)
    model = AutoModelForCausalLM.from_pretrained(system.target, dtype=torch.float32)
    backend = tokenizer.backend_tokenizer.to_str().encode()
    grammars = Grammars(TokenizerDescription(backend, "", (tokenizer.eos_token_id,), {}, len(tokenizer), ""))
    prompt = tokenizer("A tree has one root").input_ids
    answer: tuple[int, ...] = ()
    with torch.inference_mode():
        while tokenizer.eos_token_id not in answer:
            allowed = grammars.constraint(json.dumps(SCHEMA)).allowed(answer)
            assert allowed is not None
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -1, : len(tokenizer)]
            logits[list(FEW_BLANKS)] -= 30
            logits[~torch.from_numpy(allowed[: len(tokenizer)])] = -torch.inf
            answer = (*answer, int(logits.argmax()))
    options: Any = {"temperature": 0, "max_tokens": 600, "json_schema": SCHEMA, "speculation": "tree"}
    found = system.client.generate("A tree has one root", **options, logit_bias=FEW_BLANKS)
    assert found.text == tokenizer.decode(answer, skip_special_tokens=True)
    assert found.usage.num_completion_tokens == len(answer)


@pytest.mark.parametrize("rule", ["sequoia", "traversal", "coupled", "sample_and_walk"])
def test_every_rule_holds_an_answer_of_every_mode(system: System, rule: str) -> None:
    options: Any = {"max_tokens": 600, "json_schema": json.dumps(SCHEMA), "logit_bias": FEW_BLANKS, "logprobs": 2}
    answers = [
        system.client.generate(CONVERSATION, **options, rule=rule, speculation=mode) for mode in ("off", "tree", "auto")
    ]
    for each in answers:
        validate(json.loads(each.text), SCHEMA)
        assert all(0 >= token.processed > -1000 for token in each.logprobs)
    assert answers[1].speculation.num_drafted_steps > 0


def test_each_of_several_choices_is_the_answer_of_its_own_seed(openai: OpenAI) -> None:
    several = [each.message.content for each in ask(openai, n=3, seed=8).choices]
    alone = [ask(openai, seed=seed).choices[0].message.content for seed in (8, 9, 10)]
    assert several == alone
    assert len(set(several)) == 3


def test_an_answer_goes_on_at_another_coordinator_as_it_began(system: System) -> None:
    options: RequestOptions = {"seed": 5, "max_tokens": 600, "json_schema": SCHEMA, "logit_bias": FEW_BLANKS}
    request = build_request("A tree has one root", options)
    with open_sync_channel(system.deployment.address) as channel:
        generate = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate
        whole = [token for each in generate(request, timeout=60) for token in each.token_ids]
        for count in (1, len(whole) // 2, len(whole) - 1):
            request.generated_token_ids[:] = whole[:count]
            assert [token for each in generate(request, timeout=60) for token in each.token_ids] == whole[count:]


def test_tokens_that_do_not_follow_the_schema_are_no_beginning_of_an_answer(system: System) -> None:
    request = build_request("A tree has one root", {"json_schema": SCHEMA})
    request.generated_token_ids[:] = [70, 70]
    with open_sync_channel(system.deployment.address) as channel:
        answers = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate(request, timeout=60)
        with pytest.raises(Exception, match=r"sampling.json_schema: the 2 tokens of the answer do not follow it"):
            next(answers)


def test_a_limit_cuts_the_answer_and_says_so(openai: OpenAI) -> None:
    choice = ask(openai, max_tokens=5, temperature=0).choices[0]
    assert choice.finish_reason == "length"
    assert (
        choice.message.content == ask(openai, temperature=0).choices[0].message.content[: len(choice.message.content)]
    )


def test_a_stop_string_ends_the_answer_within_the_json(openai: OpenAI) -> None:
    whole, cut = (ask(openai, temperature=0, **options).choices[0].message.content for options in ({}, {"stop": ":"}))
    assert cut == whole.partition(":")[0]


def test_any_object_is_json_and_an_object(openai: OpenAI) -> None:
    form = {"type": "json_object"}
    options: Any = {"seed": 2, "logit_bias": {**FEW_BLANKS, TOKENIZER.token_to_id("}"): 30}}
    answer = ask(openai, response_format=form, **options).choices[0]
    assert isinstance(json.loads(answer.message.content), dict)


def test_a_class_of_pydantic_is_parsed_by_the_official_client(openai: OpenAI) -> None:
    class Verdict(BaseModel):
        accepted: bool
        nodes: list[bool]

    options: Any = {"max_tokens": 600, "seed": 1, "logit_bias": {**FEW_BLANKS, TOKENIZER.token_to_id("]"): 20}}
    answer = openai.chat.completions.parse(model="target", messages=MESSAGES, response_format=Verdict, **options)
    assert isinstance(answer.choices[0].message.parsed, Verdict)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "description": "x"}}},
        "response_format.json_schema.description",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}},
        "response_format",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "x" * 2**16}}}},
        "response_format",
    ),
    ({"extra_body": {"min_tokens": 2}}, "min_tokens"),
    ({"extra_body": {"ignore_eos": True}}, "ignore_eos"),
    ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "response_format"),
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=lambda value: str(value)[:60])
def test_what_cannot_be_served_is_refused_by_its_name(
    openai: OpenAI, fields: dict[str, Any], param: str, streams: bool
) -> None:
    body: Any = {"model": "target", "messages": MESSAGES, "response_format": FORM, "stream": streams, **fields}
    with pytest.raises(BadRequestError) as refused:
        openai.chat.completions.create(**body)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("schema", "reason"), [({1, 2}, "JSON cannot write it"), ("{", "is no JSON"), (5, "is no JSON object")]
)
def test_the_client_hears_what_is_wrong_with_its_schema(system: System, schema: Any, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"json_schema: {reason}"):
        system.client.generate("A tree", json_schema=schema)


def test_a_completion_can_be_held_too(system: System, openai: OpenAI) -> None:
    options: Any = {"temperature": 0, "max_tokens": 600, "logit_bias": FEW_BLANKS}
    answer = openai.completions.create(model="target", prompt="A tree", extra_body={"response_format": FORM}, **options)
    with Client(system.deployment.address) as client:
        assert answer.choices[0].text == client.generate("A tree", json_schema=SCHEMA, **options).text
